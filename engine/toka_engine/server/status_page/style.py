"""The style of the status page: light and dark as the reader's system is, and one column on a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f5f6f8; --card: #ffffff; --edge: #dde1e7; --text: #1b2330; --soft: #5b6675;
  --accent: #2456c7; --accent-text: #ffffff; --fill: #2456c722; --grid: #e7eaef;
  --good: #13703a; --good-ground: #dff3e6; --wait: #8a5200; --wait-ground: #fdf0d8; --bad: #b3261e;
  --bad-ground: #fbe4e2;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #12161c; --card: #1a2028; --edge: #2d3642; --text: #e6eaf0; --soft: #9aa6b5;
    --accent: #8ab0ff; --accent-text: #0d1626; --fill: #8ab0ff2b; --grid: #262e39;
    --good: #7ddba0; --good-ground: #163524; --wait: #f2c272; --wait-ground: #3a2b10; --bad: #ff9d95;
  --bad-ground: #43191a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; padding-top: 22px; padding-bottom: 6px; }
h1 { font-size: 22px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 12px; }
h3 { font-size: 13px; font-weight: 500; margin: 0; color: var(--soft); }
p { margin: 0 0 10px; }
.soft { color: var(--soft); }
.small { font-size: 13px; }
.pill { display: inline-block; border-radius: 999px; padding: 1px 11px; font-size: 13px; font-weight: 600;
  white-space: nowrap; }
.pill.good { color: var(--good); background: var(--good-ground); }
.pill.wait { color: var(--wait); background: var(--wait-ground); }
.pill.bad { color: var(--bad); background: var(--bad-ground); }
.version { margin-left: auto; font-size: 13px; color: var(--soft); }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; padding-top: 10px; padding-bottom: 10px; }
#live, #content { display: grid; gap: 16px; min-width: 0; }
#live, #content, main > * { grid-template-columns: minmax(0, 1fr); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 16px 18px;
  min-width: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px 20px; margin: 0; }
.numbers dt, .facts dt { color: var(--soft); font-size: 13px; }
.numbers dd { margin: 0; font-size: 26px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.25; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px 20px;
  margin: 14px 0 0; padding-top: 14px; border-top: 1px solid var(--edge); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 18px 22px; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; align-items: baseline; gap: 10px; margin-bottom: 4px; }
figcaption strong { font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { display: block; width: 100%; height: 96px; overflow: visible; }
.axis { display: flex; justify-content: space-between; font-size: 12px; color: var(--soft); margin-top: 3px; }
.grid { stroke: var(--grid); stroke-width: 1; vector-effect: non-scaling-stroke; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
.area { fill: var(--fill); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--edge); vertical-align: top;
  white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
td .note { white-space: normal; color: var(--soft); font-size: 13px; max-width: 340px; }
code { font-family: var(--mono); font-size: 13px; }
progress { appearance: none; width: 130px; height: 8px; border: 0; border-radius: 4px; overflow: hidden;
  background: var(--grid); vertical-align: middle; margin-right: 8px; }
progress::-webkit-progress-bar { background: var(--grid); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
form { margin: 0; }
label { display: block; font-size: 13px; color: var(--soft); }
input, select, textarea, button { font: inherit; color: inherit; }
input, select, textarea { width: 100%; margin-top: 3px; padding: 7px 10px; color: var(--text);
  background: var(--ground); border: 1px solid var(--edge); border-radius: 7px; }
textarea { resize: vertical; min-height: 68px; }
button { padding: 7px 16px; border: 1px solid var(--edge); border-radius: 7px; background: var(--card);
  cursor: pointer; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--accent-text); font-weight: 600; }
button:disabled { opacity: 0.5; cursor: default; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.row { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-end; }
.row > label { flex: 1 1 130px; }
.settings { margin-bottom: 12px; }
.actions { margin-top: 10px; }
.actions .soft { margin: 0 0 0 auto; align-self: center; }
#talk { display: grid; gap: 10px; max-height: 420px; overflow-y: auto; margin-bottom: 12px; }
#talk:empty { display: none; }
.turn { padding: 9px 13px; border-radius: 9px; background: var(--ground); white-space: pre-wrap;
  overflow-wrap: anywhere; }
.turn.user { background: var(--fill); justify-self: end; max-width: 85%; }
.turn.failed { color: var(--bad); background: var(--bad-ground); }
.turn .thought { color: var(--soft); font-size: 13px; border-left: 2px solid var(--edge); padding-left: 10px;
  margin-bottom: 8px; }
.turn .thought:empty { display: none; }
.turn .cost { color: var(--soft); font-size: 12px; margin-top: 5px; }
.turn .cost:empty { display: none; }
.error { color: var(--bad); margin: 8px 0 0; }
.error:empty, [hidden] { display: none !important; }
.skip { position: absolute; left: -9999px; }
.skip:focus { left: 12px; top: 8px; background: var(--card); padding: 6px 12px; border-radius: 7px; z-index: 1; }
footer { padding-top: 4px; padding-bottom: 28px; font-size: 13px; color: var(--soft); }
footer { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 18px; }
footer a, summary { color: var(--accent); }
summary { cursor: pointer; font-size: 13px; }
details form { margin-top: 10px; max-width: 520px; }
@media (max-width: 560px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  .card { padding: 14px; }
  .numbers { grid-template-columns: 1fr 1fr; }
  .numbers dd { font-size: 22px; }
  .version { margin-left: 0; width: 100%; }
  .actions .soft { margin-left: 0; width: 100%; }
}
@media (prefers-reduced-motion: no-preference) { button { transition: opacity 0.1s; } }
"""
