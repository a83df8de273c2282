#include "pool.h"

#include <unistd.h>

#include <chrono>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgelearn {

namespace {

using Clock = std::chrono::steady_clock;

// Waking a sleeping thread can cost more than a round of tiny networks (0.4 ms in virtual
// machines). After a short round, threads look for the next one for a while before they sleep.
constexpr auto kShort = std::chrono::milliseconds(2);
constexpr auto kPatience = std::chrono::milliseconds(1);

// Looks until `found()`, or until patience ends.
template <typename Found>
void look_out(Found&& found) {
  const auto end = Clock::now() + kPatience;
  while (!found() && Clock::now() < end) {
    for (int i = 0; i < 64 && !found(); i++) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }
}

}  // namespace

Pool& Pool::shared() {
  static std::mutex mutex;
  static Pool* pool = nullptr;  // never destroyed: its threads wait until the process ends
  static pid_t owner = 0;
  std::lock_guard lock(mutex);
  if (owner != getpid()) {
    pool = new Pool;
    owner = getpid();
  }
  return *pool;
}

void Pool::run(int threads, const std::function<void()>& body) {
  if (threads <= 1) return body();
  std::lock_guard caller(callers_);
  {
    std::lock_guard lock(mutex_);
    body_ = &body;
    wanted_ = running_ = threads - 1;
    error_ = nullptr;
    for (; workers_ < wanted_; workers_++) {
      std::thread(&Pool::work, this, round_.load()).detach();
    }
    round_++;
  }
  start_.notify_all();
  std::exception_ptr error;
  try {
    body();
  } catch (...) {
    error = std::current_exception();
  }
  std::unique_lock lock(mutex_);
  running_ -= wanted_;
  wanted_ = 0;
  if (running_ != 0) {
    lock.unlock();
    look_out([this] { return running_ == 0; });
    lock.lock();
  }
  done_.wait(lock, [this] { return running_ == 0; });
  if (!error) error = error_;
  if (error) std::rethrow_exception(error);
}

void Pool::work(unsigned long seen) {
  std::unique_lock lock(mutex_);
  for (;;) {
    start_.wait(lock, [&] { return round_ != seen; });
    seen = round_;
    if (wanted_ == 0) continue;  // enough others came, or all is done
    wanted_--;
    const std::function<void()>& body = *body_;
    lock.unlock();
    const auto begun = Clock::now();
    std::exception_ptr error;
    try {
      body();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !error_) error_ = error;
    if (--running_ == 0) done_.notify_one();
    if (Clock::now() - begun < kShort) {
      lock.unlock();
      look_out([&] { return round_ != seen; });
      lock.lock();
    }
  }
}

}  // namespace edgelearn
