"""What the benchmarks are held to: issue 6's table, and whether a figure meets it.

All are ratios to a stock LoRA of the same total rank on the same modules, in the same process.
"""

# method: time of forward and backward of a layer in float32, in bfloat16, and peak memory beyond the base layer's
LAYER = {
    "moelora": (0.95, 0.95, 0.3),
    "moelora_one_task": (0.95, 0.95, 0.3),
    "molora": (1.03, 1.03, 0.3),
    "molora_k1_r64": (0.60, 0.72, 1.0),
    "molora_k2_r64": (0.80, 1.0, 1.0),
    "molora_n32": (0.80, 1.0, 1.0),
    "medmoelora": (1.03, 1.03, 0.3),
    "at_moe": (0.95, 0.95, 0.3),
}
# of the whole model, for each method: float32, bfloat16
MODEL = {
    "train": (1.03, 1.03),
    "memory": (1.0, 1.0),
    "prefill": (1.03, 1.03),
    "decode_1": (1.02, 1.08),
    "decode_8": (1.02, 1.08),
    "generate_1": (1.02, 1.08),
    "generate_8": (1.02, 1.08),
}


def target_of(subject: str, method: str, dtype: str, step: str) -> float | None:
    """The largest ratio that is allowed; None if the issue asks for nothing here.

    Args:
        subject: "layer" or "model".
        method: as in methods.py.
        dtype: as in methods.py.
        step: "train", "memory", "prefill", "decode_1", ...
    """
    half = dtype != "fp32"
    if subject == "model":
        return (
            MODEL[step][half]
            if step in MODEL and method not in ("recording", "lora", "medmoelora_unbalanced")
            else None
        )
    if method not in LAYER or step not in ("train", "memory"):
        return None
    return LAYER[method][2 if step == "memory" else int(half)]


def verdict(ratio: float, target: float | None) -> str:
    """A cell of a table: the target and whether it is met, as printed."""
    if target is None:
        return "–"
    return f"{target:.2f}, {'met' if round(ratio, 2) <= target else 'missed'}"
