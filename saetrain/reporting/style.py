"""The style sheet of a report: light, dark, on paper and on a phone."""

from __future__ import annotations

from saetrain.reporting.charts import COLOURS

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c1f23;--soft:#5b626b;--rule:#d9dde2;--panel:#f5f6f8;
--c0:#0b62a4;--c1:#c2354a;--c2:#257a4a;--c3:#7d4f9e;--c4:#a8650a;--c5:#1f8080;--c6:#5f6368;--c7:#a3315d}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e8ea;--soft:#a2a9b1;--rule:#343a41;--panel:#1c2025;
--c0:#5aa9e6;--c1:#f0788a;--c2:#62c08a;--c3:#bd95dc;--c4:#e3a24f;--c5:#5cc4c4;--c6:#a9afb6;--c7:#e77fae}}
*{box-sizing:border-box} body{margin:0 auto;padding:28px 20px 56px;max-width:1240px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,sans-serif} h1{font-size:26px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 10px;padding-top:14px;border-top:1px solid var(--rule)} p{margin:8px 0;max-width:80ch}
.soft{color:var(--soft)} .lead{font-size:17px;margin:4px 0 0} a{color:var(--c0)}
dl{margin:0} dt{color:var(--soft);font-size:13px} dd{margin:0;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:16px 0 0} .facts dt{padding-top:2px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:20px 0 8px}
.tiles div{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:10px 14px}
.tiles b{display:block;white-space:nowrap;font-size:24px;line-height:1.25;font-variant-numeric:tabular-nums}
.tiles span{display:block;color:var(--soft);font-size:13px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:18px 0 0;font-size:14px}
.wide{overflow-x:auto} table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;border-bottom:1px solid var(--rule);text-align:right;vertical-align:top}
tr>*{white-space:nowrap} thead th{color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}
th:first-child,td.text{text-align:left} tr>td.text{white-space:normal;min-width:18em} tbody th{font-weight:500}
.swatch{display:inline-block;width:1.7em;margin-right:7px;border-radius:4px;text-align:center;font-size:12px;
background:currentColor} .swatch b{color:var(--paper);font-weight:600} .band{fill:currentColor;opacity:.18}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:22px 24px}
.first{max-width:620px} .first svg text{font-size:8px} .legend{display:flex;flex-wrap:wrap;gap:3px 16px;font-size:13px;
max-width:none} figure{margin:0;break-inside:avoid} figcaption{display:flex;justify-content:space-between;gap:10px;
font-size:13.5px;margin-bottom:3px} figcaption b{font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{display:block;width:100%;height:auto} svg text{font:10px system-ui,sans-serif;fill:var(--soft)}
svg .name{fill:var(--ink);font-weight:600} .grid{stroke:var(--rule);stroke-width:.7} .front{fill:none;stroke:var(--ink);
stroke-width:1;stroke-dasharray:4 3} .line{fill:none;stroke:currentColor;stroke-width:1.6;stroke-linecap:round;
stroke-linejoin:round} .dot{fill:var(--paper);stroke:currentColor;stroke-width:1.6} .dot.on{fill:currentColor}
.settings{columns:240px;column-gap:28px;font-size:13px}
.settings div{display:flex;justify-content:space-between;gap:12px;
break-inside:avoid;border-bottom:1px solid var(--rule);padding:2px 0} .settings dd{text-align:right}
@media (max-width:560px){body{padding:18px 14px 40px} .facts{grid-template-columns:1fr;gap:0}
.facts dd{margin-bottom:8px} tr>td.text{min-width:12em} .first svg text{font-size:10px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))} .tiles b{font-size:17px;white-space:normal}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--rule:#ccc;--panel:#fff;--c0:#0b62a4;
--c1:#c2354a;--c2:#257a4a;--c3:#7d4f9e;--c4:#a8650a;--c5:#1f8080;--c6:#5f6368;--c7:#a3315d}
body{padding:0;max-width:none;font-size:11px} h1{font-size:20px}
h2{font-size:14px;margin:18px 0 6px;padding-top:8px;break-after:avoid}
.lead{font-size:13px} nav{display:none} .tiles{grid-template-columns:repeat(4,1fr)} .tiles b{font-size:14px}
.tiles span,dt,thead th,figcaption,.settings,.legend,.swatch{font-size:10px} .legend{break-after:avoid}
 .charts{grid-template-columns:repeat(3,1fr);gap:10px 14px}
.first{max-width:440px} .wide{overflow:visible} tr{break-inside:avoid} tr>*{white-space:normal;padding-right:8px}
.swatch,.swatch b{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
SHEET = STYLE + "".join(f".c{i}{{color:var(--c{i})}}" for i in range(COLOURS))
