"""How the report's page looks, in light and in dark."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1c1c1a; --soft: #66655f; --line: #e2e1dc;
  --dense: #aaa89f; --sparse: #256ad2; --gone: #e26a2e; --good: #e5f2e8; --good-edge: #2e8b57; --warn: #fdf0dc;
  --warn-edge: #c77a12; --slow: #b4480f; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --card: #1e1e1c; --ink: #ecebe5; --soft: #a3a199;
  --line: #353430; --dense: #76746c; --sparse: #5596f2; --good: #16291d; --good-edge: #4fb37c; --warn: #33260f;
  --warn-edge: #dd9a3c; --slow: #f0975f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45; -webkit-text-size-adjust: 100%;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 20px 48px; }
header { display: flex; align-items: center; flex-wrap: wrap; gap: 12px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0 0 12px; }
code { font: 12.5px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.chip { border: 1px solid var(--line); border-radius: 99px; padding: 2px 11px; color: var(--soft); font-size: 13px; }
.verdict { margin: 16px 0; padding: 11px 15px; border-radius: 8px; background: var(--card);
  border: 1px solid var(--line); border-left: 4px solid var(--soft); }
.verdict.good { background: var(--good); border-left-color: var(--good-edge); }
.verdict.warn { background: var(--warn); border-left-color: var(--warn-edge); }
.verdict span { color: var(--soft); font-size: 13.5px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile .label, .tile .detail { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 30px; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3; }
.tile small { font-size: 15px; font-weight: 450; color: var(--soft); letter-spacing: 0; margin-left: 5px; }
.tile.hero .value { color: var(--sparse); font-size: 38px; line-height: 1.2; }
.tile.slow .value { color: var(--slow); }
.meter { height: 5px; border-radius: 3px; background: var(--line); margin: 4px 0 7px; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--sparse); }
section { margin-top: 16px; padding: 18px 18px 16px; }
.note, .legend { color: var(--soft); font-size: 13px; margin: 0 0 10px; }
.wide + .note { margin: 10px 0 0; }
.soft, small { color: var(--soft); }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; max-width: 1180px; min-width: 760px; font-size: 12.5px; fill: var(--ink); }
svg .name { text-anchor: end; }
svg .figure { fill: var(--soft); white-space: pre; font-variant-numeric: tabular-nums; }
svg .slow { fill: var(--slow); }
svg .dense { fill: var(--dense); }
svg .sparse { fill: var(--sparse); }
svg .axis { stroke: var(--line); }
svg .whisker { stroke: var(--ink); stroke-width: 1.2; fill: none; }
.legend i { display: inline-block; width: 14px; height: 11px; border-radius: 2px; margin: 0 6px 0 12px; }
.legend i:first-child { margin-left: 0; }
.legend .dense { background: var(--dense); }
.legend .sparse { background: var(--sparse); }
.legend .none { border: 1px solid var(--line); }
.legend .gone { background: rgb(226 106 46 / 0.3); }
.legend .ramp { width: 52px; background: linear-gradient(90deg, rgb(37 106 210 / 0.12), rgb(37 106 210)); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 550; font-size: 12.5px; vertical-align: bottom; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); }
td { vertical-align: top; }
td > code, td > span { white-space: nowrap; }
td > code.long { white-space: normal; display: inline-block; min-width: 200px; }
th:first-child, td:first-child { padding-left: 2px; }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: var(--page); }
.n { text-align: right; white-space: nowrap; }
th.n { white-space: normal; }
.n small { display: inline-block; min-width: 36px; }
small { font-size: 12px; }
details { margin-top: 8px; }
td details { margin: 0; }
summary { cursor: pointer; color: var(--soft); font-size: 13.5px; }
ul { margin: 6px 0 0; padding-left: 20px; font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(176px, 1fr)); gap: 18px 14px; }
figure { margin: 0; }
img { image-rendering: pixelated; border: 1px solid var(--line); display: block; }
figcaption { margin-top: 6px; overflow-wrap: anywhere; }
figcaption small { display: block; font-size: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; font-size: 13.5px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""
