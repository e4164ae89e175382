"""Made-up results of the size and shape of a real evaluation: many methods, every protocol, both explained classes."""

from __future__ import annotations

import itertools

import numpy as np

from vitexplain.evaluate.results import Column, Curve, Figure, GalleryPhoto, MethodEntry, Results

# How good each is, 0 (worst) to 1 (best); everything else is drawn around that.
METHODS: dict[str, tuple[str, float]] = {
    "tokentm": ("TokenTM / VTranM", 0.93),
    "tokentm:necc=false": ("TokenTM / VTranM", 0.96),
    "gmar": ("GMAR", 0.55),
    "iba": ("IBA (reconstruction)", 1.0),
    "transformer_mm": ("Transformer-MM", 0.95),
    "transformer_attribution": ("Transformer Attribution", 0.9),
    "attcat": ("AttCAT", 0.5),
    "legrad": ("LeGrad", 0.88),
    "cdam": ("CDAM", 0.8),
    "rollout": ("Attention rollout", 0.48),
    "raw_attention": ("Raw attention", 0.52),
    "grad_cam": ("Attention Grad-CAM", 0.3),
    "lrp": ("LRP (to pixels)", 0.62),
    "partial_lrp": ("Partial LRP", 0.45),
    "conservative_lrp": ("Conservative LRP", 0.6),
    "input_x_gradient": ("Input × gradient", 0.35),
    "integrated_gradients": ("Integrated gradients", 0.42),
    "smoothgrad": ("SmoothGrad", 0.4),
}
CONTROLS = {"random": 0.02, "centre prior": 0.46, "negated tokentm": -0.7}
ABLATIONS = {"last block alone": 0.6, "+ aggregate": 0.85, "+ length": 0.93}
SIGNED = frozenset({"attcat", "cdam", "input_x_gradient", "grad_cam"})

# protocol, metric, explained classes, better, unit, value of the worst and of the best, half an interval, largest gap unresolved
_METRICS = [
    ("perturbation", "positive", ("pred", "gt"), "lower", "%", 34.0, 13.4, 1.3, 0.5),
    ("perturbation", "negative", ("pred", "gt"), "higher", "%", 28.0, 58.1, 1.6, 0.8),
    ("perturbation", "AOPC", ("pred",), "higher", "", 0.41, 0.557, 0.012, 0.002),
    ("perturbation", "LOdds", ("pred",), "lower", "", -3.2, -4.91, 0.14, 0.08),
    ("insertion_deletion", "insertion", ("pred",), "higher", "%", 31.0, 52.5, 1.9, 1.2),
    ("insertion_deletion", "deletion", ("pred",), "lower", "%", 29.0, 11.2, 1.1, 0.3),
    ("average_drop", "average drop", ("pred",), "lower", "%", 88.0, 31.0, 2.6, 1.5),
    ("average_drop", "average increase", ("pred",), "higher", "%", 1.0, 21.0, 3.2, 4.0),
    ("localisation", "pixel accuracy", ("pred",), "higher", "%", 48.0, 79.5, 0.9, 0.2),
    ("localisation", "mIoU", ("pred",), "higher", "%", 30.0, 61.2, 1.1, 0.4),
    ("localisation", "mAP", ("pred",), "higher", "%", 52.0, 87.0, 0.8, 0.3),
    ("localisation", "AUROC", ("pred",), "higher", "%", 50.0, 86.5, 0.9, 0.9),
    ("saco", "SaCo", ("pred",), "higher", "", -0.02, 0.41, 0.03, 0.05),
    ("ablation", "positive", ("pred",), "lower", "%", 34.0, 13.4, 1.3, 0.5),
    ("ablation", "negative", ("pred",), "higher", "%", 28.0, 58.1, 1.6, 0.8),
    ("quantus:metric=Sparseness", "Sparseness", ("pred",), "higher", "", 0.1, 0.72, 0.01, 0.002),
]
# protocol, name, explained classes, y axis, value at 0 and at 100 %, and the exponent of the best and of the worst
_CURVES = [
    ("perturbation", "positive", ("pred", "gt"), "accuracy, %", 80.0, 0.2, 4.6, 1.4),
    ("perturbation", "negative", ("pred", "gt"), "accuracy, %", 80.0, 0.2, 0.3, 1.8),
    ("insertion_deletion", "insertion", ("pred",), "probability, %", 9.0, 74.0, 4.0, 1.2),
    ("insertion_deletion", "deletion", ("pred",), "probability, %", 74.0, 0.3, 5.0, 1.5),
]
_LOCALISATION_CENTRE_PRIOR = 0.86


def made_results(seed: int = 0) -> Results:
    """Eighteen methods, three controls, three rows of an ablation, 500 images."""
    generator = np.random.default_rng(seed)
    entries = {label: MethodEntry(title, "method") for label, (title, _) in METHODS.items()}
    entries |= {label: MethodEntry(label, "control") for label in CONTROLS}
    entries |= {label: MethodEntry("TokenTM / VTranM", "ablation", {"necc": False}) for label in ABLATIONS}
    figures: list[Figure] = []
    columns: list[Column] = []
    for protocol, metric, classes, better, unit, worst, best, half, gap in _METRICS:
        for explained in classes:
            cells = [
                _figure(generator, label, protocol, metric, explained, worst + goodness * (best - worst), half)
                for label, goodness in _goodness(protocol).items()
            ]
            figures += cells
            columns.append(_column(cells, better, unit, gap))
    return Results(entries, tuple(columns), tuple(figures), _curves(), _settings(), _environment(), _left_out(), _timing())


def _goodness(protocol: str) -> dict[str, float]:
    """Of each row that the protocol's table has."""
    if protocol == "ablation":
        return ABLATIONS
    methods = {label: goodness for label, (_, goodness) in METHODS.items()}
    if protocol == "localisation":
        return methods | CONTROLS | {"centre prior": _LOCALISATION_CENTRE_PRIOR}
    if protocol.startswith("quantus"):
        return {label: methods[label] for label in ("tokentm", "gmar", "iba")}
    return methods | CONTROLS


def _figure(
    generator: np.random.Generator, label: str, protocol: str, metric: str, explained: str, value: float, half: float
) -> Figure:
    mean = value + generator.normal() * half * 0.4
    low, high = mean - half * generator.uniform(0.9, 1.1), mean + half * generator.uniform(0.9, 1.1)
    return Figure(label, protocol, metric, explained, float(mean), float(low), float(high), 500)


def _column(cells: list[Figure], better: str, unit: str, gap: float) -> Column:
    """The winner is the best method if the next is further off than ``gap``."""
    sign = 1 if better == "lower" else -1
    ranked = sorted((cell for cell in cells if cell.method not in CONTROLS), key=lambda cell: sign * cell.mean)
    contenders = tuple(cell.method for cell in ranked if abs(cell.mean - ranked[0].mean) <= gap)
    winner = contenders[0] if len(contenders) == 1 else None
    cell = cells[0]
    return Column(cell.protocol, cell.metric, cell.explained, better, unit, winner, contenders)


def _curves() -> tuple[Curve, ...]:
    share = np.linspace(0, 100, 21)
    found = []
    for protocol, name, classes, quantity, start, end, fast, slow in _CURVES:
        for explained, (label, goodness) in itertools.product(classes, _goodness(protocol).items()):
            rate = slow + goodness * (fast - slow)
            decay = (np.exp(-rate * share / 100) - np.exp(-rate)) / (1 - np.exp(-rate)) if rate > 0.05 else 1 - share / 100
            mean = end + (start - end) * decay
            half = 0.4 + 2.0 * np.sin(np.pi * share / 100)
            found.append(
                Curve(
                    label,
                    protocol,
                    name,
                    explained,
                    quantity,
                    tuple(share.tolist()),
                    tuple(mean.tolist()),
                    tuple((mean - half).tolist()),
                    tuple((mean + half).tolist()),
                )
            )
    return tuple(found)


def _settings() -> dict[str, object]:
    options = {"gmar": {"norm": "l1", "alpha": 1.0}, "smoothgrad": {"samples": 25, "noise": 0.5, "seed": 0}}
    protocols: dict[str, dict[str, object]] = {
        "perturbation": {"convention": "vtranm", "substrate": "black"},
        "insertion_deletion": {"step": 5, "insertion_substrate": "blur", "deletion_substrate": "zeros"},
        "average_drop": {},
        "localisation": {"threshold": "mean"},
        "saco": {"groups": 10, "substrate": "mean"},
    }
    return {
        "model": {
            "name": "deit_tiny_patch16_224",
            "weights_sha256": "8c2f60b1e27a" * 5,
            "input_size": [224, 224],
            "resize": "model",
        },
        "data": {"name": "imagenet_sample", "kind": "npz", "images": 502, "sha256": "5be10c77d9a0" * 5},
        "methods": {label: {"name": label.partition(":")[0], "options": options.get(label, {})} for label in METHODS},
        "protocols": {label: {"name": label, "options": chosen} for label, chosen in protocols.items()},
        "explained": ["pred", "gt"],
        "controls": True,
        "dtype": "bfloat16",
        "seed": 0,
        "bootstrap": 2000,
    }


def _environment() -> dict[str, object]:
    versions = "python 3.11.2, vitexplain 0.1.0, torch 2.9.0+cu128, timm 1.0.20, numpy 2.3.1"
    return {"device": "NVIDIA H200", "threads": 16, "versions": versions}


def _left_out() -> tuple[dict[str, str], ...]:
    return (
        {"id": "n02105855_2933.JPEG", "reason": "truncated: 1,204 bytes of 93,110"},
        {"id": "n04238763_118.JPEG", "reason": "not a picture"},
    )


def _timing() -> dict[str, object]:
    return {"seconds": {"explaining": 41.52, "perturbation": 371.18, "all": 412.7}, "images": 500, "images_per_second": 1.2115}


def made_photos(count: int = 12, seed: int = 0, methods: tuple[str, ...] = tuple(METHODS)) -> list[GalleryPhoto]:
    """Photos of coloured blobs, and maps that agree less and less the earlier the photo stands."""
    generator = np.random.default_rng(seed)
    return [_photo(generator, index, 0.72 - 0.05 * index, methods) for index in range(count)]


def _photo(generator: np.random.Generator, index: int, disagreement: float, methods: tuple[str, ...]) -> GalleryPhoto:
    rows, columns = np.mgrid[0:224, 0:224] / 224
    x, y, width = generator.uniform((0.25, 0.25, 0.12), (0.75, 0.75, 0.25))
    blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * width**2))[..., None]
    ground, figure = generator.uniform(40, 200, (2, 3))
    texture = generator.normal(0, 6, (224, 224, 3)) + 18 * np.sin(40 * rows + 9 * index)[..., None]
    photo = np.clip(ground * (1 - blob) + figure * blob + texture, 0, 255).astype(np.uint8)
    patches = blob[8::16, 8::16, 0]
    maps = {
        label: (patches + max(disagreement, 0.05) * generator.normal(0, 0.6, patches.shape)).astype(np.float32)
        for label in methods
    }
    maps = {label: heat if label in SIGNED else np.abs(heat) for label, heat in maps.items()}
    caption = f"predicted: tench {90 - 3 * index} %; true: tench"
    return GalleryPhoto(f"n0144076{index}_{1000 + 7 * index}", caption, photo, maps, SIGNED, disagreement)
