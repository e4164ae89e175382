"""Train the small Vision Transformer that the demo explains (CIFAR-10, 32×32 pixels, 8×8 patches).

The student keeps every second block of a 12-block teacher and learns from the teacher's logits (temperature 2) and from
the labels, with random crops and flips. On two CPU cores in bfloat16 it takes about a quarter of an hour:

    python examples/train_demo_model.py --data cifar10_jpeg.npz --teacher vit_tiny_p4_32_cifar10_fp16.safetensors

It writes the weights (float16 safetensors) and, beside them, a JSON file with all that is needed to use them: the timm
constructor's arguments, normalisation, class names, and the measured test accuracy.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

SHARED_CONFIG = dict(img_size=32, patch_size=4, embed_dim=192, num_heads=3, num_classes=10)
TEACHER_DEPTH = 12
STUDENT_DEPTH = 6
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ASSETS = Path(__file__).resolve().parent.parent / "vitexplain" / "assets"


def decode_split(archive: dict[str, np.ndarray], split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one split of the JPEG archive to images (N, 3, 32, 32) uint8 and labels (N,) int64."""
    stream, offsets = archive[f"{split}_jpeg"], archive[f"{split}_offsets"]
    pixels = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(stream[start:stop].tobytes())).convert("RGB"))
            for start, stop in itertools.pairwise(offsets)
        ]
    )
    labels = torch.from_numpy(archive[f"{split}_labels"].astype(np.int64))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, h, w) to float32 with ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def augment(images: torch.Tensor, generator: torch.Generator, pad: int = 4) -> torch.Tensor:
    """Random crop from a reflected border, and a random horizontal flip; one of each per image."""
    size = images.shape[-1]
    padded = F.pad(images.float(), (pad,) * 4, mode="reflect").to(torch.uint8)
    shifts = torch.randint(0, 2 * pad + 1, (len(images), 2), generator=generator).tolist()
    flips = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    crops = [
        image[:, top : top + size, left : left + size].flip(-1) if flip else image[:, top : top + size, left : left + size]
        for image, (top, left), flip in zip(padded, shifts, flips, strict=True)
    ]
    return torch.stack(crops)


def student_from_teacher(teacher: VisionTransformer) -> VisionTransformer:
    """A half-deep student that starts from every second block of the teacher."""
    student = VisionTransformer(depth=STUDENT_DEPTH, **SHARED_CONFIG)
    stride = TEACHER_DEPTH // STUDENT_DEPTH
    kept = {f"blocks.{stride * i + stride - 1}.": f"blocks.{i}." for i in range(STUDENT_DEPTH)}
    weights = {}
    for name, value in teacher.state_dict().items():
        if not name.startswith("blocks."):
            weights[name] = value
        for old, new in kept.items():
            if name.startswith(old):
                weights[new + name.removeprefix(old)] = value
    student.load_state_dict(weights)
    return student


@torch.inference_mode()
def accuracy(model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor, batch: int = 500) -> float:
    """Top-1 accuracy in percent, float32."""
    model.eval()
    hits = sum(
        int((model(normalise(images[i : i + batch])).argmax(-1) == labels[i : i + batch]).sum())
        for i in range(0, len(images), batch)
    )
    return 100 * hits / len(images)


def distil(
    student: VisionTransformer,
    teacher: VisionTransformer,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
    temperature: float = 2.0,
) -> None:
    """Train the student in place: half Kullback-Leibler to the teacher, half cross-entropy to the labels."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    teacher.eval()
    step, started = 0, time.perf_counter()
    for epoch in range(epochs):
        student.train()
        order = torch.randperm(len(images), generator=generator)
        for indices in order[: len(order) // batch * batch].split(batch):
            inputs = normalise(augment(images[indices], generator))
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    wanted = teacher(inputs).float()
                logits = student(inputs).float()
            soft = F.kl_div(
                F.log_softmax(logits / temperature, -1),
                F.log_softmax(wanted / temperature, -1),
                log_target=True,
                reduction="batchmean",
            )
            loss = 0.5 * temperature**2 * soft + 0.5 * F.cross_entropy(logits, labels[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 50 == 0:
                rate = step * batch / (time.perf_counter() - started)
                print(f"epoch {epoch + 1}/{epochs}  step {step}/{steps}  loss {loss.item():.4f}  {rate:.0f} images/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz with train_/test_ jpeg, offsets, labels and class_names")
    parser.add_argument("--teacher", type=Path, required=True, help="safetensors of the 12-block ViT-Tiny to learn from")
    parser.add_argument("--output", type=Path, default=ASSETS / "demo_vit_cifar10.safetensors")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    with np.load(options.data) as archive:
        data = dict(archive.items())
    train_images, train_labels = decode_split(data, "train")
    test_images, test_labels = decode_split(data, "test")
    teacher = VisionTransformer(depth=TEACHER_DEPTH, **SHARED_CONFIG)
    teacher.load_state_dict({name: value.float() for name, value in load_file(options.teacher).items()})
    student = student_from_teacher(teacher)
    started = time.perf_counter()
    distil(
        student,
        teacher,
        train_images,
        train_labels,
        epochs=options.epochs,
        batch=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    minutes = (time.perf_counter() - started) / 60

    weights = {name: value.half().contiguous() for name, value in student.state_dict().items()}
    student.load_state_dict({name: value.float() for name, value in weights.items()})  # measure what is shipped
    measured = accuracy(student, test_images, test_labels)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.output)
    card = {
        "architecture": "timm.models.vision_transformer.VisionTransformer",
        "arguments": {**SHARED_CONFIG, "depth": STUDENT_DEPTH},
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "crop_mode": "squash",  # CIFAR's photos are tight on their subject: take the whole photo, squeezed to a square
        "class_names": [str(name) for name in data["class_names"]],
        "training": {
            "data": "CIFAR-10 (Krizhevsky 2009), JPEG quality 75",
            "script": "examples/train_demo_model.py",
            "epochs": options.epochs,
            "batch": options.batch,
            "learning_rate": options.learning_rate,
            "seed": options.seed,
            "minutes": round(minutes, 1),
            "torch": torch.__version__,
        },
        "test_accuracy_percent": round(measured, 2),
        "test_images": len(test_images),
    }
    options.output.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    size = options.output.stat().st_size / 1e6
    print(f"test accuracy {measured:.2f} % on {len(test_images)} images; {size:.2f} MB; {minutes:.1f} min")


if __name__ == "__main__":
    main()
