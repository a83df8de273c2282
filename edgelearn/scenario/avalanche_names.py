"""The names that may follow `avalanche:`, without importing Avalanche: what works, and what not.

Each was run through the checks of client strategies with avalanche-lib 0.6.0; a test keeps the
lists in step with the package, and `docs/avalanche.md` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from edgelearn.errors import nearest

_RESETS = "its reset of the network is overwritten by the global parameters"
_ENDLESS = "its endless loader begins anew in each round"
_NO_TASKS = "not in task-incremental streams"
_MIR = "it leaves out the classes of the last batch, so the second experience may replay nothing"
_COUNTS = "not in online streams: it counts the samples of an experience when it begins"
_FEATURES = f"the network has to be an avalanche.models.BaseModel; {_NO_TASKS}"

# Name -> what to know, if anything.
WORKS: Mapping[str, str] = MappingProxyType(
    {
        "AGEM": _ENDLESS,
        "AGEMPlugin": _ENDLESS,
        "CWRStar": f"cwr_layer_name is that of the last layer, such as '3'; {_RESETS}; {_COUNTS}",
        "CWRStarPlugin": f"{_RESETS}; {_COUNTS}",
        "Cumulative": "state_kib has to hold all samples of the device, as float32",
        "DER": f"{_ENDLESS}; {_NO_TASKS}",
        "ER_ACE": _ENDLESS,
        "EWC": "its Fisher information is that of mean gradients of batches",
        "EWCPlugin": "its Fisher information is that of mean gradients of batches",
        "FromScratchTraining": _RESETS,
        "FromScratchTrainingPlugin": _RESETS,
        "GDumb": "trains on its buffer alone; " + _RESETS,
        "GDumbPlugin": "trains on its buffer alone; " + _RESETS,
        "GEM": "needs the package quadprog, which the extra installs",
        "GEMPlugin": "needs the package quadprog, which the extra installs",
        "LFL": _FEATURES,
        "LFLPlugin": _FEATURES,
        "LwF": "",
        "LwFPlugin": "",
        "MAS": "",
        "MASPlugin": "",
        "MER": "many steps for each batch, and small ones",
        "MIR": f"{_ENDLESS}; {_MIR}",
        "MIRPlugin": f"{_ENDLESS}; {_MIR}",
        "Naive": "",
        "RARPlugin": _NO_TASKS,
        "RWalkPlugin": "fewer than delta_t steps in an experience make it divide by zero",
        "Replay": "",
        "ReplayPlugin": "",
    }
)

_NO_CLASSIFIER = "it trains a generator of samples, not a classifier"
_BIC = "it writes to attributes that experiences no longer let it, and calls what torch removed"
_MEANS = "it predicts by class means of a head that is not the scenario's network"
_COPE = "it replaces the last layer, and predicts by prototypes of its own"
_GSS = "it fails in Avalanche itself, on its empty buffer"
_ALIASED = (
    "on a processor it keeps views of the weights where it means copies, so that no path is ever "
    "measured, all importances stay zero, and it learns as Naive does"
)
_GENERATOR = "its generator knows images of 28x28 only, and would have to be shared"

# Name -> why it does not work.
FAILS: Mapping[str, str] = MappingProxyType(
    {
        "AETraining": _NO_CLASSIFIER,
        "AR1": "it replaces the network by one that it downloads",
        "BiC": _BIC,
        "BiCPlugin": _BIC,
        "CoPE": _COPE,
        "CoPEPlugin": _COPE,
        "CurrentDataFeCAMUpdate": _MEANS,
        "CurrentDataNCMUpdate": _MEANS,
        "ER_AML": "it needs a feature extractor apart, and never ends on a small buffer",
        "EarlyStoppingPlugin": "it needs Avalanche's own evaluation, which does not run here",
        "ExpertGateStrategy": "it needs a network of its own, which grows",
        "FeCAMOracle": _MEANS,
        "FeatureDistillationPlugin": "it reads features that only FeatureExtractorModel leaves",
        "FeatureReplay": "it moves the last layer to a module of its own around the network",
        "GSS_greedy": _GSS,
        "GSS_greedyPlugin": _GSS,
        "GenerativeReplay": _GENERATOR,
        "GenerativeReplayPlugin": _GENERATOR,
        "ICaRL": "it needs feature extractor and classifier apart, and predicts by class means",
        "JointTraining": "it needs all experiences at once",
        "LRSchedulerPlugin": "it needs one optimizer for all rounds; here each round has its own",
        "LearningToPrompt": "it needs a vision transformer of the package timm",
        "MemoryFeCAMUpdate": _MEANS,
        "MemoryNCMUpdate": _MEANS,
        "NCMOracle": _MEANS,
        "PNNStrategy": "it needs a network of its own, which grows",
        "PackNet": "it needs a network of its own, and masks that can't be averaged",
        "SCR": "it needs a network of its own, and predicts by class means",
        "SynapticIntelligence": _ALIASED,
        "SynapticIntelligencePlugin": _ALIASED,
        "StreamingLDA": "it predicts by discriminant analysis, not by the network that is served",
        "TrainGeneratorAfterExpPlugin": _GENERATOR,
        "VAETraining": _NO_CLASSIFIER,
    }
)


def fault(name: str) -> str | None:
    """Return what is wrong with a name after `avalanche:`, or None.

    Names with a colon are places of one's own classes; whether something is there shows later.
    """
    if ":" in name or name in WORKS:
        return None
    if name in FAILS:
        return f"{name} of Avalanche does not work on a device: {FAILS[name]}"
    close = nearest(name, [*WORKS, *FAILS])
    return (
        f"Avalanche has no strategy or plug-in {name!r}{close}; supported: {', '.join(WORKS)}, "
        "module:Class or path/to/file.py:Class of one's own"
    )
