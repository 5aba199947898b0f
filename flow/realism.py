"""Do pictures look real? A detector's verdict, and the Frechet distance to real ones."""
import re
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTImageProcessorPil

from flow.cli import cannot_load, check_model, fail
from flow.pictures import to_image

REAL = {"real", "human", "natural", "authentic"}  # words of a detector's labels
FAKE = {"fake", "artificial", "ai", "generated", "synthetic"}


def load_forensic(name: str, real_label: str | None, device: torch.device) -> Callable[[list[str]], Tensor]:
    """A detector of generated pictures (any image classifier): files -> P(real), (b,)."""
    check_model("--forensic", name)
    try:
        try:
            processor = AutoImageProcessor.from_pretrained(name)
        except ValueError:  # detectors of 2022 name a class that transformers 5 has no more
            processor = ViTImageProcessorPil.from_pretrained(name)
        net = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32).eval().to(device)
    except Exception as e:  # no network, another model class, a broken file: each raises its own
        cannot_load("--forensic", name, e)
    real = real_labels(name, net.config.id2label, real_label)

    @torch.no_grad()
    def score(files: list[str]) -> Tensor:
        """Files -> (b,)."""
        inputs = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt").to(device)
        return net(**inputs).logits.softmax(1)[:, real].sum(1).cpu()

    return score


def real_labels(name: str, labels: dict[int, str], real_label: str | None) -> list[int]:
    """Which of a detector's labels mean a real picture: --real-label, or by their words, all of which must be known."""
    listed = ", ".join([*labels.values()][:8]) + (", ..." if len(labels) > 8 else "")
    if real_label is not None:
        if real_label not in labels.values():
            fail(f"--real-label {real_label}: {name} has no such label; its labels are {listed}")
        return [i for i, label in labels.items() if label == real_label]
    words = {i: set(re.findall("[a-z]+", label.lower())) for i, label in labels.items()}
    real = [i for i, w in words.items() if w & REAL and not w & FAKE]
    fake = [i for i, w in words.items() if w & FAKE and not w & REAL]
    if not real or not fake or len(real) + len(fake) < len(labels):
        fail(f"--forensic {name}: which of its labels ({listed}) means a real picture? Give it as --real-label")
    return real


def load_embed(model: str, device: torch.device):
    """(network, processor): a CLIPModel, or a vision model whose output has a pooler_output (ResNet, DINOv2, ...)."""
    check_model("--embed", model)
    try:
        net = AutoModel.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False).to(device)
        return net, AutoImageProcessor.from_pretrained(model)
    except Exception as e:  # a missing folder, no network, another kind of file: each raises its own
        cannot_load("--embed", model, e)


@torch.no_grad()
def embed_images(embed, images: Tensor | list[Tensor], batch: int = 64) -> Tensor:
    """Pooled features (n, d) of images (3, h, w) in [0, 1], each of any size."""
    net, processor = embed
    run = net.get_image_features if hasattr(net, "get_image_features") else net
    features = []
    for i in range(0, len(images), batch):
        inputs = processor([to_image(x) for x in images[i:i + batch]], return_tensors="pt").to(net.device)
        features.append(run(**inputs).pooler_output.flatten(1).cpu())
    return torch.cat(features)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, arXiv 1706.08500), in float64."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(ca cb) from the eigenvalues of the product of two covariances: real and not negative but for rounding
    root = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    return (mean + ca.trace() + cb.trace() - 2 * root).item()
