"""Tables of federated averaging and of its rivals, over the settings in `federated`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelearn.reproduce.federated import (
    ALL,
    FEDAVG,
    FEDAVG_PUBLISHED,
    LABEL_SKEW,
    fedavg,
    label_skew,
)
from edgelearn.reproduce.table import Row, Table

_MCMAHAN = "McMahan et al. 2017, arXiv:1602.05629, table 1"
_NAMES = {
    "naive": "FedAvg",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "fedcurv": "FedCurv",
    "moon": "MOON",
}


_CLAIMS = {
    "fedprox": "above FedAvg on skewed data (Li et al. 2020, arXiv:1812.06127)",
    "scaffold": "above FedAvg on skewed data (Karimireddy et al. 2020, arXiv:1910.06378)",
    "fedcurv": "above FedAvg on skewed data (Shoham et al. 2019, arXiv:1910.07796)",
    "moon": "2 points and more above FedAvg (Li et al. 2021, arXiv:2103.16257)",
}


def _gain(setting: Mapping[str, Any]) -> Row:
    strategy = setting["strategy"]
    return Row(
        method=f"{_NAMES[strategy]} - FedAvg",
        setting=setting["skew"],
        run=label_skew,
        arguments=setting,
        versus={**setting, "strategy": "naive"},
        metric="accuracy",
        reference=0.0,
        bound="at least",
        published=_CLAIMS[strategy],
    )


def _fedavg_row(setting: Mapping[str, Any]) -> Row:
    takes_all = setting["batch_size"] == ALL
    published = None
    if setting["epochs"] == 1:
        published = FEDAVG_PUBLISHED[setting["partition"], takes_all]
    batch = "all" if takes_all else str(setting["batch_size"])
    return Row(
        method=f"FedAvg, B = {batch}, E = {setting['epochs']}",
        setting=setting["partition"],
        run=fedavg,
        arguments=setting,
        metric="rounds",
        reference=published,
        source=_MCMAHAN if published else "",
        note="the paper's target is 97 % of MNIST" if published else "",
    )


TABLE = Table(
    name="fedavg",
    title="Federated averaging: rounds to a target",
    about=(
        "Fashion-MNIST on 100 devices with 600 samples each, ten in a round; MLP 784-200-200-10, "
        "plain SGD; data dealt out evenly (iid) or in two label-sorted shards each. Rounds to 84 % "
        "of the float model, on a curve made monotone and interpolated, as the paper counts them. "
        "The paper's numbers are of MNIST, to 97 %, so what compares is how the rows relate: small "
        "batches against one step on all (17 times fewer, iid), two labels against all (7.6 times "
        "more, B = 10)."
    ),
    rule=(
        "a learning rate for each row out of 0.03, 0.1 and 0.3, by `federated.choose_rate`: with "
        "another seed, on training images of which 10,000 were held out. The target was set where "
        "the curves of seed 0 flatten, the same for all rows."
    ),
    rows=tuple(map(_fedavg_row, FEDAVG)),
    minutes=4.0,
    unit="rounds",
    digits=0,
    num_seeds=3,
    quick={"num_rounds": 3},
)

RIVALS = Table(
    name="label-skew",
    title="Federated averaging and its rivals where devices hold few labels",
    about=(
        "6,000 samples of Fashion-MNIST on 20 devices, ten in a round, five epochs, batch 20, rate "
        "0.05; MLP 784-100-10; labels by Dirichlet 0.1, or two shards for each device. Mean "
        "accuracy of the float model over the last five of 40 rounds. Papers claim directions: "
        "differences are taken seed by seed, and decided where their 95 % interval is on one side."
    ),
    rule=(
        "one learning rate for all, not tuned; FedCurv's strength out of 0.01, 0.1, 1 and 10 by "
        "`federated.choose_strength`, with another seed on held-out training images; FedProx's "
        "and MOON's mu were not tuned."
    ),
    rows=(
        *(
            Row(
                method=_NAMES[setting["strategy"]],
                setting=setting["skew"],
                run=label_skew,
                arguments=setting,
                metric="accuracy",
            )
            for setting in LABEL_SKEW
        ),
        *(_gain(setting) for setting in LABEL_SKEW if setting["strategy"] != "naive"),
    ),
    minutes=3.0,
    num_seeds=3,
    quick={"num_rounds": 2},
)
