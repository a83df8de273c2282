// Threads that wait between calls: starting some costs as much as a small round.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>

namespace edgelearn {

class Pool {
 public:
  // The pool of this process; a forked child gets its own, for threads don't survive a fork.
  static Pool& shared();

  // Runs `body` in up to `threads` threads at once, this one included. A body takes work from a
  // shared queue until there is none, so who wakes too late is not waited for. One caller at a
  // time. Rethrows the first exception.
  void run(int threads, const std::function<void()>& body);

 private:
  void work(unsigned long seen);

  std::mutex callers_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void()>* body_ = nullptr;
  std::atomic<unsigned long> round_ = 0;  // read without the lock while looking out
  std::atomic<int> running_ = 0;
  int workers_ = 0, wanted_ = 0;
  std::exception_ptr error_;
};

}  // namespace edgelearn
