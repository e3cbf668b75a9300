"""Style and script of report.html; both stand inside the page, which loads nothing."""

STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --page: #ffffff; --card: #f6f7f9; --ink: #1c1f24; --muted: #5c6471; --grid: #e2e6eb;
  --CLM: #1f6fb2; --MLM: #c8590b; --MNTP: #6d4bb8; --MIX: #2f7d5b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --ink: #e6e9ed; --muted: #9aa4b0; --grid: #31373f;
    --CLM: #6cb2f0; --MLM: #f2a05a; --MNTP: #b79cf2; --MIX: #6cc7a0;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 10px; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 26px 0 6px; }
p { margin: 0 0 12px; max-width: 68ch; }
code, pre { font: 0.875em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.note { color: var(--muted); font-size: 0.875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); gap: 10px; margin: 22px 0 0; }
.tiles div { background: var(--card); border-radius: 10px; padding: 12px 14px; }
.tiles dt { color: var(--muted); font-size: 0.8125rem; }
.tiles dd { margin: 0; font-size: 1.45rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles dd + dd { font-size: 0.8125rem; font-weight: 400; color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
.note + .scroll { margin-top: -6px; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th { font-weight: 600; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
th:first-child, td:first-child, .left { text-align: left; }
th:first-child { padding-left: 2px; }
td.left { white-space: normal; }
.arrow { color: var(--muted); padding: 0 3px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 7px; background: var(--c); }
figure { margin: 0; position: relative; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text { font-family: var(--font); }
figure svg * { stroke-linejoin: round; }
figure:focus-visible { outline: 2px solid var(--CLM); outline-offset: 4px; border-radius: 4px; }
.narrow { display: none; }
.cursor { position: absolute; width: 1px; background: var(--ink); opacity: 0.55; pointer-events: none; }
.tip {
  position: absolute; pointer-events: none; background: var(--page); color: var(--ink); padding: 7px 10px; z-index: 1;
  border: 1px solid var(--grid); border-radius: 8px; box-shadow: 0 4px 16px rgb(0 0 0 / 0.16);
  font-size: 0.8125rem; line-height: 1.45; white-space: pre; font-variant-numeric: tabular-nums;
}
.pairs th[scope=row] { font-weight: 400; overflow-wrap: anywhere; white-space: normal; }
.pairs thead th { text-align: left; }
.pairs tr.group th { font-weight: 600; padding-top: 14px; }
.bar { display: flex; align-items: center; gap: 8px; min-width: 110px; }
.track { position: relative; flex: 1; height: 9px; border-radius: 3px; background: var(--grid); }
.track i { position: absolute; inset: 0 auto 0 0; border-radius: 3px; background: var(--c); }
.track b { position: absolute; top: -3px; bottom: -3px; left: 50%; width: 1px; background: var(--ink); opacity: 0.6; }
.bar span:last-child { width: 3.2em; text-align: right; }
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border-radius: 10px; padding: 14px 16px; overflow-x: auto; white-space: pre-wrap; }
@media (max-width: 640px) {
  main { padding: 22px 16px 48px; }
  .wide { display: none; }
  .narrow { display: block; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles dd { font-size: 1.2rem; }
  th, td { padding: 5px 5px; font-size: 0.8125rem; }
  .objective { display: none; }
  .pairs thead { display: none; }
  .pairs tr { display: block; padding: 6px 0; border-bottom: 1px solid var(--grid); }
  .pairs th, .pairs td { display: block; border: 0; padding: 1px 2px; }
  .pairs td { display: flex; }
  .pairs td::before { content: attr(data-label); flex: 0 0 4.5em; text-align: left; color: var(--muted); }
  .pairs .bar { flex: 1; }
}
@media print { details > * { display: block; } .narrow { display: none; } .wide { display: block; } }
"""

# Shows the measurements nearest to the pointer, or to the step chosen with the arrow keys.
SCRIPT = """
const rows = JSON.parse(document.getElementById("measurements").textContent);
for (const figure of document.querySelectorAll("figure[data-box]")) {
  const [width, height, left, right, top, bottom, steps] = JSON.parse(figure.dataset.box);
  const cursor = document.createElement("div"), tip = document.createElement("div");
  cursor.className = "cursor"; tip.className = "tip"; tip.setAttribute("role", "status");
  let chosen = -1;
  const hide = () => { cursor.remove(); tip.remove(); };
  const show = index => {
    if (!rows.length) return;
    chosen = Math.max(0, Math.min(rows.length - 1, index));
    const [step, text] = rows[chosen], scale = figure.clientWidth / width;
    const x = (left + (right - left) * step / steps) * scale;
    tip.textContent = text;
    figure.append(cursor, tip);
    cursor.style.left = x + "px"; cursor.style.top = top * scale + "px";
    cursor.style.height = (bottom - top) * scale + "px";
    const beside = x + 12 + tip.offsetWidth <= figure.clientWidth ? x + 12 : x - 12 - tip.offsetWidth;
    tip.style.left = Math.max(0, beside) + "px"; tip.style.top = (top + 8) * scale + "px";
  };
  figure.addEventListener("pointermove", event => {
    const at = (event.clientX - figure.getBoundingClientRect().left) * width / figure.clientWidth;
    const step = steps * (at - left) / (right - left);
    let best = 0;
    rows.forEach(([at], index) => { if (Math.abs(at - step) < Math.abs(rows[best][0] - step)) best = index; });
    show(best);
  });
  figure.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (move) { event.preventDefault(); show(chosen + move); }
    if (event.key === "Escape") hide();
  });
}
"""
