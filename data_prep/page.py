"""The frame of report.html: its style, light and dark, for a wide screen and a narrow one."""

from __future__ import annotations

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>$title · data_prep</title>
<style>
:root{--ink:#1c2330;--soft:#68738a;--ground:#f6f7f9;--card:#fff;--line:#e3e7ee;--bar:#3b6fd4;--track:#e9edf4;--drop:#c0442f}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf2;--soft:#97a3b8;--ground:#12161d;--card:#1a202a;--line:#2a3240;
--bar:#6f9cf2;--track:#252d3a;--drop:#ee8a76}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 20px;overflow-wrap:anywhere}
.origin{margin:-14px 0 20px;color:var(--soft);overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 14px}h3{font-size:14px;margin:0 0 10px;font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tile,.chart,.box{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft)}
.tile small{display:block;color:var(--soft);font-size:12px}
.step{display:grid;grid-template-columns:96px minmax(0,1fr);gap:2px 14px;padding:8px 0;border-top:1px solid var(--line)}
.step:first-child{border-top:0}.step .name{font-weight:600;line-height:30px}
.track{position:relative;background:var(--track);border-radius:6px;height:30px;overflow:hidden}
.track b{position:absolute;inset:0 auto 0 0;background:var(--bar);opacity:.35}
.track span{position:relative;padding:0 10px;line-height:30px;font-variant-numeric:tabular-nums;white-space:nowrap}
.notes{grid-column:2;color:var(--soft);font-size:13px}.notes ul{margin:0;padding:0;list-style:none;color:var(--drop)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:12px}
.bars{display:grid;grid-template-columns:max-content minmax(0,1fr) max-content;gap:4px 10px;
align-items:center;font-size:13px;font-variant-numeric:tabular-nums}
.bars i{background:var(--track);height:12px;border-radius:3px;display:block}
.bars b{display:block;height:12px;border-radius:3px;background:var(--bar)}
.bars .count{text-align:right;color:var(--soft)}
.rest{margin:8px 0 0;color:var(--soft);font-size:13px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure img,.none{display:block;width:100%;height:110px;object-fit:contain;background:#0b0e13}
.none{color:#7c879b;text-align:center;line-height:110px;font-size:13px}
figcaption{padding:7px 9px;font-size:12px;line-height:1.35;color:var(--soft);overflow-wrap:anywhere}
figcaption em{display:block;font-style:normal;color:var(--ink)}
table{border-collapse:collapse;width:100%;font-size:13px}
td,th{text-align:left;padding:5px 10px 5px 0;vertical-align:top;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}.counts td:first-child{width:90px;text-align:right}
.counts th:first-child{text-align:right}details{margin-top:12px}summary{cursor:pointer;color:var(--soft)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px;margin:0}
@media (max-width:520px){main{padding:20px 12px}.step{grid-template-columns:1fr}.notes{grid-column:1}
.grid{grid-template-columns:repeat(2,minmax(0,1fr))}.charts{grid-template-columns:1fr}}
</style></head><body><main>
<h1>$title</h1>$origin
<div class="tiles">$totals</div>
<h2>What entered and left each step</h2><div class="box" id="funnel">$funnel</div>
<h2>What was kept</h2><div class="grid" id="kept">$kept</div>
<h2>How it is spread</h2><div class="charts" id="charts">$histograms</div>
<h2>What was dropped or reported, and why</h2><div class="grid" id="dropped">$dropped</div>
<h2>Every reason</h2><div class="box" id="failures">$failures</div>
<h2>Settings</h2><div class="box"><details><summary>as the folder was made</summary><pre>$settings</pre></details></div>
</main></body></html>
""")
