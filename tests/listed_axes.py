"""Every parameter of every model: the names of its axes, and whether it is a matrix and decays."""

import re

MIXER, MEMORY = "blocks/mixer", "layers heads"
CONVOLVED, LOW_RANK = ("query", "key", "value", "inputs"), ("decay", "rate", "share", "gate")
MIXED = ("", "_decay", "_gate", "_key", "_rate", "_receptance", "_value")
GATES = ("gate_rate", "gate_rate_1", "gate_retention", "gate_momentum", "rate", "decay/map")
LISTED = {
    "embedding": ("vocab embed", "decays"),
    "head": ("embed vocab", "decays"),
    **{f"{norm}/{name}": ("embed", "") for norm in ("norm", "embedding_norm") for name in ("scale", "bias")},
    **{f"blocks/norm/{name}": ("layers embed", "") for name in ("scale", "bias")},
    **{f"{MIXER}/{name}/kernel": ("layers ? ?", "matrix decays") for name in ("query", "key", "value")},
    **{f"{MIXER}/{name}/kernel": ("layers embed all_heads", "matrix decays") for name in ("receptance", "gate")},
    **{f"{MIXER}/project_{n}/kernel": ("layers ? all_heads", "matrix decays") for n in ("q", "k", "v", "qk")},
    **dict.fromkeys((f"{MIXER}/out/kernel", f"{MIXER}/down/kernel"), ("layers all_heads embed", "matrix decays")),
    f"{MIXER}/out/gate/kernel": ("layers embed all_heads", "matrix decays"),
    f"{MIXER}/out/down/kernel": ("layers all_heads embed", "matrix decays"),
    **{f"{MIXER}/out/{name}": ("layers heads head_dim", "") for name in ("scale_query", "scale_answer")},
    f"{MIXER}/out/scale": ("layers ... head_dim", ""),
    **{f"{MIXER}/conv_{n}/kernel": ("layers taps ?", "") for n in "qkv"},
    **{f"{MIXER}/convs_{i}/kernel": ("layers taps embed", "") for i in range(3)},
    **{f"{MIXER}/{name}/kernel": ("layers embed heads", "") for name in GATES},
    **{f"{MIXER}/{name}/bias": (MEMORY, "") for name in GATES if name != "decay/map"},
    f"{MIXER}/start_memory_0": (f"{MEMORY} head_dim ?", "matrix"),
    f"{MIXER}/start_memory_1": (f"{MEMORY} memory_hidden head_dim", "matrix"),
    f"{MIXER}/start_weights_0": (f"{MEMORY} head_dim ?", "matrix"),
    f"{MIXER}/start_weights_1": (f"{MEMORY} memory_hidden head_dim", "matrix"),
    f"{MIXER}/start_projections_0": (f"{MEMORY} memories head_dim memory_hidden", "matrix"),
    f"{MIXER}/start_projections_1": (f"{MEMORY} memories memory_hidden head_dim", "matrix"),
    f"{MIXER}/start_gates_0": (f"{MEMORY} memories head_dim memory_hidden", "matrix"),
    f"{MIXER}/start_gates_1": (f"{MEMORY} memories memory_hidden gate", "matrix"),
    **{f"{MIXER}/log_rate_{group}": (MEMORY, "") for group in ("memory", "projections", "gates")},
    **{f"{MIXER}/{name}_bias": (MEMORY, "") for name in ("rate", "retention", "momentum")},
    f"{MIXER}/momentum_kernel": (f"{MEMORY} head_dim", ""),
    **{f"blocks/feed_forward/{name}": ("layers levels", "") for name in ("rate", "mixture")},
    **{
        f"blocks/feed_forward/{level}{name}": (f"layers {axes}", follows)
        for level in ("", "prime/", "second/", "level_0/", "level_1/")
        for name, axes, follows in (
            ("norm/scale", "embed", ""),
            ("gate/kernel", "embed hidden", "matrix decays"),
            ("up/kernel", "embed hidden", "matrix decays"),
            ("down/kernel", "hidden embed", "matrix decays"),
        )
    },
    **{
        f"blocks/feed_forward/level_{i}/{name}_basis": ("layers embed rank", "matrix")
        for i in (0, 1)
        for name in ("gate", "up")
    },
    **{f"blocks/feed_forward/level_{i}/down_basis": ("layers hidden rank", "matrix") for i in (0, 1)},
    f"{MIXER}/persistent": ("layers persistent embed", ""),
    **{f"{MIXER}/{name}/scale": ("layers embed", "") for name in ("out/norm_attention", "out/norm_memory")},
    f"{MIXER}/norm_recalled/scale": ("layers embed", ""),
    f"{MIXER}/relevance/kernel": ("layers embed embed", "matrix decays"),
    # TTT: the convolution before it, and the layer
    f"{MIXER}/conv/kernel": ("layers taps embed", ""),
    f"{MIXER}/conv/bias": ("layers embed", ""),
    **{f"{MIXER}/conv_{n}/bias": ("layers all_heads", "") for n in "qk"},
    **{
        f"{MIXER}/{name}": (f"{MEMORY} ?", "") for name in ("inner_scale", "inner_bias", "start_bias_0", "start_bias_1")
    },
    f"{MIXER}/gain": ("layers places", ""),
    **{f"{MIXER}/norm/{name}": ("layers all_heads", "") for name in ("scale", "bias")},
    # Gated DeltaNet, Comba, Mamba-2
    **{f"{MIXER}/{n}/project/kernel": ("layers embed all_heads", "matrix decays") for n in CONVOLVED},
    **{f"{MIXER}/{n}/conv/kernel": ("layers taps all_heads", "") for n in CONVOLVED},
    **{f"{MIXER}/{name}": ("layers all_heads", "") for name in ("inputs/conv/bias", "scale")},
    **{f"{MIXER}/{name}": (MEMORY, "") for name in ("decay/log_decay", "decay/step_bias", "skip")},
    **{f"{MIXER}/{name}": (MEMORY, "") for name in ("erase_share", "correction")},
    # RWKV-7
    **{f"{MIXER}/mix{name}": ("layers embed", "") for name in MIXED},
    **{f"{MIXER}/{name}/down/kernel": ("layers embed rank", "matrix") for name in LOW_RANK},
    **{f"{MIXER}/{name}/up/kernel": ("layers rank all_heads", "matrix") for name in LOW_RANK},
    **{f"{MIXER}/{name}/offset": ("layers all_heads", "") for name in ("decay", "rate", "share")},
    **{f"{MIXER}/{name}": ("layers all_heads", "") for name in ("erase_scale", "key_scale")},
    f"{MIXER}/bonus": (f"{MEMORY} head_dim", ""),
    # LSTM and SRWM
    **{f"{MIXER}/kernel_{name}": ("layers embed cell_gates", "matrix decays") for name in ("input", "hidden")},
    **{f"{MIXER}/bias_{name}": ("layers cell_gates", "") for name in ("input", "hidden")},
    **{f"{MIXER}/start_{name}": (f"{MEMORY} head_dim ?", "matrix") for name in ("y", "q", "k", "rates")},
}
"""By the path of the parameter. A question mark is any name, three dots are any number of names."""


def listed(path):
    """The entry of a parameter. Blocks of a pattern, and mixers inside a mixer, have the parameters of their kind."""
    path = re.sub("^blocks/parts_[0-9]+/", "blocks/", path)
    return re.sub("^blocks/mixer/(local|memory|attention)/", "blocks/mixer/", path)


def fits(names, expected):
    """Whether axis names are as the list says."""
    expected = expected.replace("?", "[a-z_]+").replace("... ", "([a-z_]+ )*")
    return re.fullmatch(expected, " ".join(names)) is not None
