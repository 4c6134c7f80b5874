"""Which blocks of the pages the tests do not run as they stand, each with its reason. All other blocks run."""

from __future__ import annotations

from dataclasses import dataclass

from doc_pages import Block, Command

SMALL = ("--transform", "cifar10", "--set", "crop=padded", "--epochs", "1")
FEW = ("--allow-missing", "--bootstrap", "0", "--methods", "grood,msp,knn:k=5")

# Words that are exchanged in commands and in Python, so that a block takes seconds: (page, what is there, instead).
SMALLER: tuple[tuple[str, str, str], ...] = (
    ("README.md", "torchvision:resnet50", "torchvision:shufflenet_v2_x0_5"),
    ("README.md", "resnet18 --pretrained", "shufflenet_v2_x0_5 --pretrained"),
    ("docs/index.md", "resnet18 --pretrained", "shufflenet_v2_x0_5 --pretrained"),
    ("docs/pretrained.md", "resnet18 --pretrained", "shufflenet_v2_x0_5 --pretrained"),
    ("docs/train.md", "resnet18 --pretrained", "shufflenet_v2_x0_5 --pretrained"),
    ("docs/export.md", "(224, 224)", "(32, 32)"),
    ("docs/train.md", '"epochs=20"', '"epochs=1"'),
    ("docs/serve.md", "--model nets.py:resnet20 --weights r20.pt ", ""),
    # The application, without a port to listen at until somebody stops it.
    ("docs/serve.md", "Settings, run", "Settings, make_app"),
    ("docs/serve.md", "\nrun(", "\nmake_app("),
    # The journal of the commands above is of another kind.
    ("docs/watch.md", 'Path("decisions.jsonl")', 'Path("of-python.jsonl")'),
    ("docs/scale.md", "/models/", ""),
    ("docs/scale.md", "/data/photos", "photos"),
    ("docs/scale.md", "/data/scores", "scores-of-python"),
    ("docs/scale.md", "/data/flowers", "flowers"),
    ("docs/scale.md", "/data/", ""),
    ("docs/scale.md", "workers=8", "workers=1"),
)

# A page's first block of TOML is this file.
TOML_FILES = {"docs/add-a-benchmark.md": "flowers.toml"}

# A page that makes what another page presupposes begins without it.
AFRESH = {"docs/pretrained.md": "runs/flowers", "docs/train.md": "runs/flowers"}

# Blocks that show a result before the page says how it was made: they run last.
SHOWN_FIRST = (("docs/explain.md", "commands", 0),)

# Options that are added to a command: (how it begins, options). The first that fits is taken.
ADDED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("grood train shufflenet_v2_x0_5 --pretrained", SMALL),
    ("grood train cifar10-resnet18 --data ~", ("--epochs", "1")),
    ("grood fit --model torchvision:shufflenet_v2_x0_5 --weights flowers.safetensors", ("--transform", "cifar10")),
    ("grood benchmark cifar10 --root", FEW),
    ("grood benchmark cifar10 --model networks.py", FEW),
    ("grood benchmark flowers.toml", ("--bootstrap", "0", "--methods", "grood,msp", "--transform", "cifar10")),
    ("grood benchmark my.toml", ("--bootstrap", "0", "--methods", "grood,knn", "--transform", "cifar10")),
    ("grood serve", ("--port", "0")),
)


@dataclass(frozen=True)
class NotRun:
    """A block, or a command, that cannot run here.

    Attributes:
        page: where it is.
        start: how the command begins, or "python N" for the N-th block of Python.
        why: for people.
        fails: what it says here, a regular expression; the test runs it and expects just that, so that nothing stays
            on this list that would run. None: it is shown by `needs` instead.
        needs: a file that is not there, or one of `BEYOND_TESTS`.
    """

    page: str
    start: str
    why: str
    fails: str | None = None
    needs: str | None = None

    def fits(self, block: Block, command: Command | None = None) -> bool:
        """Whether this is the block, or the command of it."""
        if self.page not in (block.page, "*"):
            return False
        if command is None:
            return self.start == f"python {block.number}" and block.language == "python"
        return str(command).startswith(self.start)


BEYOND_TESTS = ("network", "time", "another program")

NOT_RUN = (
    NotRun("docs/integrations.md", "python 0", "OpenOOD is not on PyPI", fails="No module named 'openood"),
    NotRun("docs/integrations.md", "python 1", "OpenOOD is not on PyPI", fails="GROODPostprocessor"),
    NotRun(
        "docs/pretrained.md",
        "grood fit --model torchvision:vit_b_16",
        "ImageNet may not be passed on",
        fails="imagenet/train",
    ),
    NotRun("docs/pretrained.md", "grood score vit.grood", "a detector of ImageNet's images", fails="vit.grood"),
    NotRun(
        "docs/pretrained.md",
        "grood train imagenet-resnet50",
        "ImageNet's images; the paths are placeholders",
        fails="resnet50-0676ba61.pth|…",
    ),
    NotRun("docs/pretrained.md", "grood benchmark imagenet", "ImageNet may not be passed on", fails="image sets under"),
    NotRun(
        "docs/long-fits.md", "grood fit --model torchvision:resnet50", "downloads ResNet-50's weights", fails="resnet50"
    ),
    NotRun(
        "docs/data.md", "grood data cifar10 --root {home}/data --fetch", "downloads OpenOOD's images", needs="network"
    ),
    NotRun(
        "docs/results/accelerator.md",
        "grood train cifar10-resnet18",
        "100 epochs on a GPU, in bfloat16",
        needs="runs/cifar10-0",
    ),
    NotRun(
        "docs/results/accelerator.md",
        "grood benchmark cifar10",
        "the networks of the line above, on a GPU",
        fails="no such weights file",
    ),
    NotRun(
        "docs/results/accelerator.md",
        "grood benchmark found",
        "the results of the line above",
        fails="found/results.json",
    ),
    NotRun(
        "docs/results/accelerator.md", "accelerate launch", "ImageNet on eight GPUs", needs="openood/images_largescale"
    ),
    NotRun(
        "docs/results/cifar10-resnet18.md",
        "grood train",
        "two hours on OpenOOD's images",
        needs="runs/cifar10-resnet18-15",
    ),
    NotRun(
        "docs/results/cifar10-resnet18.md",
        "grood benchmark",
        "the network of the line above",
        fails="runs/cifar10-resnet18-15",
    ),
    NotRun("docs/results/cifar10.md", "grood benchmark …", "options are left out by dots", fails="--model is missing"),
    NotRun(
        "docs/results/cifar10.md",
        "grood benchmark",
        "OpenOOD's images; the list of methods ends in dots",
        fails="…",
    ),
    NotRun(
        "docs/research/ood-prototype.md",
        "grood benchmark",
        "OpenOOD's images; options are left out by dots",
        fails="…",
    ),
    NotRun("docs/train.md", "grood train cifar10-resnet18", "100 epochs in bfloat16", needs="runs/seed0"),
    NotRun("docs/serve.md", "grood serve flowers.onnx --host 0.0.0.0", "listens to the whole network", fails="token"),
    NotRun("docs/scale.md", "grood score flowers.onnx s3://", "images and scores in a bucket", fails="s3"),
    NotRun("docs/scale.md", "grood score flowers.onnx table.parquet", "a table of images", fails="table.parquet"),
    NotRun(
        "docs/scale.md", "grood fit --model torchvision:resnet50", "downloads ResNet-50's weights", fails="resnet50|s3"
    ),
    NotRun("docs/scale.md", "torchrun", "eight processes", needs="another program"),
    NotRun("docs/scale.md", "ray", "starts a cluster", needs="another program"),
    NotRun("*", "python benchmarks/", "measures for minutes to hours on real images", needs="time"),
    NotRun("*", "python research/", "computes for minutes to hours on real images", needs="time"),
    NotRun("*", "python -", "a file that a training on a GPU leaves", needs="runs/cifar10-0/model.safetensors"),
    NotRun("*", "pip install", "installs", needs="network"),
    NotRun("*", "make", "builds an environment, and runs these tests", needs="time"),
    NotRun("*", "mkdir", "of the shell", needs="another program"),
    NotRun("*", "camera", "stands for any program that writes lines", needs="another program"),
)
