"""The loop that one writes first: model, DataLoader and optimizer per device, in one process."""

import torch
from clock import Clock, argument, figures, finish
from work import Work, train


def main():
    torch.set_num_threads(1)
    asked = argument()
    work = Work(asked["data"])
    torch.manual_seed(work.facts["seed"])
    weights = {k: v.clone() for k, v in work.init.items()}
    clock = Clock(budget_s=asked["budget_s"], min_rounds=asked["min_rounds"])
    clock.start()
    server_round, done, loss = 0, False, None
    while not done:
        server_round += 1
        total, mean, losses = 0, {k: torch.zeros_like(v) for k, v in weights.items()}, []
        for device in work.devices(server_round):
            model = work.model()
            model.load_state_dict(weights)
            losses.append((train(model, work, device), len(work.parts[device])))
            total += len(work.parts[device])
            for name, value in model.state_dict().items():
                mean[name] += value * len(work.parts[device])
        weights = {k: v / total for k, v in mean.items()}
        loss = loss or sum(v * n for v, n in losses) / total
        done = clock.round_done()
    used = clock.cpu_s()
    samples = work.samples(2, len(clock.walls))
    found = figures(clock, used, samples, work.cohort, work.mean_samples, work.flops_per_sample)
    finish({**found, "first_loss": loss})


if __name__ == "__main__":
    main()
