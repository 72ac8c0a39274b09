"""A coarsening as one page: a table, and pictures of the masks before and after; no network, no scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from torch import Tensor

from fxsparse.coarsen.permute import permuted
from fxsparse.coarsen.report import HEADER, Coarsened, cells

_PICTURED = 24


def page(found: Coarsened, masks: Mapping[str, Tensor], title: str, draw: Callable[[Tensor], str]) -> str:
    """The page as text.

    masks  those that were given
    draw   a bool [O, n] -> the address of a picture of it, such as a data URI
    """
    head = [title.replace("w^2", "w\u00b2") for title in HEADER]
    table = _table(head, [cells(layer) for layer in found.layers])
    said = "".join(f"<p>{escape(x.name)}: {escape(x.fallback)}</p>" for x in found.layers if x.fallback)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><main><h1>{escape(title)}</h1>
<p>The masks below are another function than the ones given: fine-tune the model with them.</p>
<section><h2>Weights</h2>{table}{said}</section>
<section><h2>Before and after</h2>
<p>Rows are output channels, columns (input channel, kernel position); the darker, the denser. The second picture is the
given mask with rows sorted by group and columns by use, the third the result in the same order.</p>
{_pictures(found, masks, draw)}</section>
</main></body></html>
"""


def _pictures(found: Coarsened, masks: Mapping[str, Tensor], draw: Callable[[Tensor], str]) -> str:
    """Three pictures for each of the largest coarsened weights, in the model's order."""
    layers = [layer for layer in found.layers if found.groups[layer.name]]
    largest = {x.name for x in sorted(layers, key=lambda x: -masks[x.name].numel())[:_PICTURED]}
    figures = []
    for layer in (x for x in layers if x.name in largest):
        groups, given = found.groups[layer.name], masks[layer.name].bool()
        shown = (
            ("given", given.flatten(1).cpu()),
            ("given, permuted", permuted(given, groups)),
            ("coarsened, permuted", permuted(found.masks[layer.name], groups)),
        )
        pictures = "".join(
            f'<figure><img src="{draw(mask)}" alt="{escape(layer.name)}, {what}">'
            f"<figcaption>{what}</figcaption></figure>"
            for what, mask in shown
        )
        size = "\u00d7".join(map(str, given.shape))
        figures.append(f"<h3><code>{escape(layer.name)}</code> {size}, {layer.groups} groups, "
                       f"{layer.l2_kept:.1%} of w\u00b2</h3><div>{pictures}</div>")  # fmt: skip
    rest = len(layers) - len(figures)
    return "\n".join(figures) + (f"<p>{rest} smaller weights are not shown.</p>" if rest else "")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in body)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1c1c1a; --soft: #66655f; --line: #e2e1dc; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --card: #1e1e1c; --ink: #ecebe5; --soft: #a3a199;
  --line: #353430; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 20px 48px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin-top: 16px; padding: 18px;
  overflow-x: auto; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 17px; margin: 0 0 12px; } h3 { font-size: 14px; margin: 18px 0 6px; }
p, figcaption { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
section > div { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; }
img { image-rendering: pixelated; border: 1px solid var(--line); display: block; width: 320px; height: 200px; }
"""
