"""The suites of `tools.bench`: what each case has that differs from the command line's defaults."""

from __future__ import annotations

from typing import Any

SPINE: list[dict[str, Any]] = [
    *(
        {"model": model, "recipe": "refill_coupled", "batch": batch, "threads": threads}
        for model in ("resnet18", "resnet50", "vgg16")
        for batch in (1, 16)
        for threads in (1, 2)
    ),
    *(
        {"model": model, "recipe": "refill_like", "batch": 1, "threads": 1}
        for model in ("resnet18", "resnet50", "vgg16")
    ),
    *(
        {"model": model, "recipe": "refill_coupled", "batch": 1, "threads": 1}
        for model in ("mobilenet_v2", "densenet121")
    ),
    {"model": "mobilenet_v2", "recipe": "dead_rows_alive_bias", "batch": 1, "threads": 1},
    *({"model": "vit_b_16", "recipe": "heads_and_neurons", "batch": 1, "threads": threads} for threads in (1, 2)),
]
BLOCKS: list[dict[str, Any]] = [
    *(
        {"model": model, "recipe": "shuffled_blocks", "sparsity": 0.74, "rows": 64, "batch": batch, "threads": threads}
        for model, batches in (("resnet18", (1, 16)), ("resnet50", (1, 16)), ("vgg16", (1, 16)), ("vit_b_16", (1,)))
        for batch in batches
        for threads in (1, 2)
    ),
    *(
        {"model": "resnet50", "recipe": "shuffled_blocks", "sparsity": sparsity, "rows": rows, "batch": 1, "threads": 1}
        for sparsity, rows in ((0.15, 64), (0.5, 64), (0.74, 32), (0.74, 16), (0.74, 8), (0.9, 64), (0.95, 64))
    ),
    {"model": "resnet50", "recipe": "shuffled_blocks_apart", "sparsity": 0.74, "rows": 64, "batch": 1, "threads": 1},
    {"model": "mobilenet_v2", "recipe": "shuffled_blocks", "sparsity": 0.74, "rows": 32, "batch": 1, "threads": 1},
]
UNSTRUCTURED: list[dict[str, Any]] = [
    {"model": model, "recipe": "unstructured", "sparsity": sparsity, "batch": batch, "threads": threads}
    for model, sparsity, batch, threads in (
        ("resnet18", 0.9, 1, 1), ("resnet18", 0.95, 1, 1), ("resnet50", 0.8, 1, 1), ("resnet50", 0.9, 1, 1),
        ("resnet50", 0.95, 1, 1), ("resnet50", 0.9, 1, 2), ("resnet50", 0.9, 16, 1), ("resnet50", 0.95, 16, 1),
        ("vgg16", 0.9, 1, 1), ("mobilenet_v2", 0.9, 1, 1),
    )
]  # fmt: skip
MATRIX: list[dict[str, Any]] = [
    {"model": model, "recipe": recipe, "sparsity": sparsity, "batch": 1 + 15 * (i % 2), "threads": 1 + i // 2 % 2}
    for model in ("resnet18_cifar", "vgg16_cifar", "mobilenet_v1_cifar", "wrn32_2_cifar", "resnet18")
    for recipe in ("shuffled_blocks", "refill_coupled", "unstructured")
    for i, sparsity in enumerate((0.2, 0.5, 0.74, 0.95))
]
GPU: list[dict[str, Any]] = [
    {"model": model, "recipe": recipe, "sparsity": sparsity, "rows": rows, "batch": 32, "threads": 4, "dtype": dtype}
    | ({"batch": 1} if model in ("prefill", "decode_wide") else {})
    for model, recipe, sparsity, rows, dtype in (
        ("resnet50", "refill_coupled", 0.5, 32, "float16"), ("resnet50", "refill_coupled", 0.5, 32, "float32"),
        ("vit_b_16", "heads_and_neurons", 0.5, 32, "bfloat16"), ("vit_l_16", "two_four", 0.5, 32, "bfloat16"),
        ("vit_l_16", "shuffled_blocks", 0.74, 128, "bfloat16"), ("vit_b_16", "shuffled_blocks", 0.74, 128, "float32"),
        ("prefill", "shuffled_blocks", 0.74, 128, "bfloat16"), ("prefill", "two_four", 0.5, 32, "bfloat16"),
        ("decode_wide", "shuffled_blocks", 0.74, 128, "bfloat16"),
    )
]  # fmt: skip
HEADLINES: list[dict[str, Any]] = [  # of the README; the losing ones with them
    *(
        {"model": model, "recipe": recipe, "sparsity": sparsity, "rows": rows, "batch": batch, "threads": threads}
        | {"dtype": dtype}
        for model, recipe, sparsity, rows, batch, threads, dtype in (
            ("resnet50", "refill_coupled", 0.5, 32, 1, 1, "float32"),
            ("resnet50", "refill_coupled", 0.5, 32, 1, 2, "float32"),
            ("resnet50", "refill_coupled", 0.5, 32, 16, 1, "float32"),
            ("mobilenet_v2", "refill_coupled", 0.5, 32, 1, 1, "float32"),
            ("vit_b_16", "heads_and_neurons", 0.5, 32, 1, 1, "float32"),
            ("resnet50", "shuffled_blocks", 0.74, 64, 1, 1, "float32"),
            ("resnet50", "shuffled_blocks", 0.74, 64, 1, 2, "float32"),
            ("resnet50", "shuffled_blocks", 0.74, 64, 16, 1, "float32"),
            ("resnet50", "shuffled_blocks", 0.74, 64, 1, 1, "bfloat16"),
            ("vgg16", "shuffled_blocks", 0.74, 64, 1, 1, "float32"),
            ("vit_b_16", "shuffled_blocks", 0.74, 64, 1, 1, "float32"),
            ("resnet50", "shuffled_blocks", 0.74, 16, 1, 1, "float32"),
            ("resnet50", "shuffled_blocks", 0.90, 64, 1, 1, "float32"),
            ("resnet50", "shuffled_blocks", 0.15, 64, 1, 1, "float32"),
            ("resnet50", "unstructured", 0.8, 32, 1, 1, "float32"),
            ("resnet50", "unstructured", 0.9, 32, 1, 1, "float32"),
        )
    ),
    *GPU,
]
SUITES = {"spine": SPINE, "blocks": BLOCKS, "unstructured": UNSTRUCTURED, "matrix": MATRIX, "gpu": GPU}
