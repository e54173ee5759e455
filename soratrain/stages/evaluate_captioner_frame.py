"""The frame of captions.html: its style, light and dark, for a wide screen and a narrow one."""

from __future__ import annotations

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>captions · $title</title>
<style>
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5f6a80;--ground:#f6f7f9;--card:#fff;--line:#e3e7ee;--accent:#3b6fd4;
--wrong:#b3261e;--wrong-ground:#fde4e1;--new:#8a5a00;--new-ground:#fff1cf;--good:#1d7a46;--good-ground:#ddf3e6}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf2;--soft:#9aa6ba;--ground:#12161d;--card:#1a202a;--line:#2a3240;
--accent:#7fa8f7;--wrong:#ff9c92;--wrong-ground:#4c201d;--new:#f4c667;--new-ground:#40320f;--good:#79d6a0;
--good-ground:#163826}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0;overflow-wrap:anywhere}h2{font-size:19px;margin:44px 0 4px}
.soft{color:var(--soft)}p.soft{margin:2px 0 16px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:12px;margin:20px 0}
.tile,.box,.clip{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:12px 16px}.tile b{display:block;font-size:23px;font-variant-numeric:tabular-nums}
.tile span{display:block;color:var(--soft);font-size:13px;line-height:1.4}
.box{padding:6px 18px 12px;margin:12px 0;overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px;min-width:100%}
caption{text-align:left;font-weight:600;padding:10px 0 6px;white-space:nowrap}
th{font-weight:500;color:var(--soft);font-size:13px}
th,td{padding:4px 0 4px 16px;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
tr.ours td{border-top:1px solid var(--line);font-weight:600}tr.beside td{color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:8px 22px;align-items:center;margin:22px 0 0}
.legend label{margin-left:auto;cursor:pointer}a{color:var(--accent)}
mark{color:var(--wrong);background:var(--wrong-ground);border-radius:4px;padding:1px 4px;margin:0 -1px;
text-decoration:underline wavy 1px;text-underline-offset:3px}
mark.new{color:var(--new);background:var(--new-ground);text-decoration:none}
.clip{display:grid;grid-template-columns:196px minmax(0,1fr);gap:18px;padding:16px;margin:12px 0}
.seen{display:flex;flex-direction:column;gap:8px}
.seen video,.seen img{display:block;width:100%;max-height:240px;object-fit:contain;border-radius:8px;background:#0b0e13}
.small .seen video,.small .seen img{image-rendering:pixelated}
.seen small{color:var(--soft);font-size:12px;line-height:1.35;overflow-wrap:anywhere}
.chips{display:flex;flex-wrap:wrap;gap:6px;margin-bottom:10px}
.chip{font-size:12px;line-height:20px;border-radius:10px;padding:0 9px;color:var(--good);background:var(--good-ground)}
.chip.no{color:var(--wrong);background:var(--wrong-ground)}.chip.plain{color:var(--soft);background:var(--ground)}
.said{display:grid;grid-template-columns:64px minmax(0,1fr) minmax(0,1fr);gap:4px 18px;align-items:baseline;
padding:9px 0;border-top:1px solid var(--line)}
.said.head{border-top:0;padding:0 0 4px;color:var(--soft);font-size:13px}.said:last-child{padding-bottom:0}
.said b{color:var(--accent);font-size:13px;font-weight:600}.said p{margin:0;overflow-wrap:anywhere}
.said p{max-height:14.2em;overflow:hidden auto;padding:0 1px}
.said p.true{color:var(--soft)}.said p+p.true{margin-top:4px}
body.only .clip:not(.bad){display:none}
@media (max-width:760px){main{padding:20px 12px 48px}.clip{grid-template-columns:minmax(0,1fr);gap:12px}
.seen{flex-direction:row;align-items:flex-start}.seen video,.seen img{width:132px;flex:none}
.said{grid-template-columns:minmax(0,1fr)}.said.head{display:none}
.said p.true::before{content:"true: "}.said p.ours::before{content:"captioner: ";color:var(--soft)}
.legend label{margin-left:0}}
</style></head><body><main>
<h1>What the captioner says</h1><p class="soft">$title</p>
<div class="tiles">$tiles</div>
<p class="soft">$remarks</p>
<div class="legend">$legend<a href="#figures">all figures</a>
<label><input type="checkbox" id="only"> only clips with a mark</label></div>
$sets
<h2 id="figures">All figures</h2><p class="soft">$meaning</p>
$tables
</main>
<script>
document.getElementById("only").onchange=e=>document.body.classList.toggle("only",e.target.checked);
const calm=matchMedia("(prefers-reduced-motion: reduce)").matches;
const near=new IntersectionObserver(all=>all.forEach(one=>one.isIntersecting?one.target.play():one.target.pause()));
document.querySelectorAll("video").forEach(one=>calm?one.controls=true:near.observe(one));
</script></body></html>
""")
