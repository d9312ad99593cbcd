// The page: a timeline of jobs, a table of what runs, a dialog for one job. It asks its own server and nobody else; as
// a file it has its data in itself (window.PGBG_FILE) and asks nobody at all.
"use strict";

const EVERY = 2000; // milliseconds between two looks at what runs
const TIMELINE_EVERY = 15000;
const MOST_LANES = 30; // labels on the timeline
const LANES_OF_PAST = 10; // of those, kept for labels of which nothing is at work, however many others are
const FILE = window.PGBG_FILE;

const $ = (id) => document.getElementById(id);
const SIGNS = Object.fromEntries([...$("state").options].filter((o) => o.value).map((o) => [o.value, o.dataset.sign]));
const state = { lines: [], jobs: [], slots: 0, leftOut: 0, notVisible: 0, mayCancel: false, sort: null, down: false, open: null, opener: null, asked: 0, charts: null };

async function ask(path) {
  const answer = await fetch(path, { headers: { accept: "application/json" } });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error || `the server answered ${answer.status}`);
  return found;
}

// The same words as the command line's.
function took(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)} h` : `${minutes}:${two(whole % 60)} min`;
}

function fits(line) {
  const pattern = $("pattern").value.trim().toLowerCase(), wanted = $("state").value;
  if (wanted && line.state !== wanted) return false;
  return !pattern || line.label.toLowerCase().includes(pattern) || line.series.toLowerCase().includes(pattern);
}

// The table --------------------------------------------------------------------------------------------------------

function sorted(lines) {
  if (!state.sort) return lines;
  const key = state.sort, sign = state.down ? -1 : 1;
  const value = (line) => (line[key] === null || line[key] === undefined ? "" : line[key]);
  return [...lines].sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1;
    return x < y ? -sign : x > y ? sign : 0;
  });
}

function cell(text, kind) {
  const made = document.createElement("td");
  if (kind) made.className = kind;
  made.textContent = text;
  return made;
}

// A button that looks like a link: it opens the page of a job.
function opener(text, job, key) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "link";
  made.textContent = text;
  made.dataset.key = key;
  made.addEventListener("click", () => {
    if (!$("job").open) state.opener = key;
    open(job.owner, job.job_id);
  });
  return made;
}

function named(made, name) {
  made.dataset.name = name; // is shown where the table has no room for columns
  return made;
}

function waitOf(line) {
  if (!line.blocker || FILE) return cell(line.waits_for, "waits");
  const made = cell("", "waits");
  made.append(opener(line.waits_for, line.blocker, `blocker of ${line.key}`));
  return made;
}

function progressOf(line) {
  const made = cell(line.progress);
  if (line.percent === null) return made;
  const bar = document.createElement("progress");
  bar.max = 100;
  bar.value = line.percent;
  bar.setAttribute("aria-label", `${line.percent} %`);
  made.prepend(bar, ` ${line.percent} % `);
  return made;
}

function row(line) {
  const made = document.createElement("tr");
  made.append(cell(`${SIGNS[line.state]} ${line.state}`, `state ${line.state.replace(" ", "-")}`));
  const name = document.createElement("td");
  name.className = "label";
  if (line.job_id && !FILE) name.append(opener(line.label, line, line.key));
  else name.textContent = line.label;
  made.append(name, cell(took(line.seconds), "number"), progressOf(line), waitOf(line),
    named(cell(line.rows === null ? "" : line.rows.toLocaleString("en"), "number"), "rows"),
    named(cell(line.attempt ?? "", "number"), "try"), named(cell(line.wanted_by || line.by), "by"),
    named(cell(line.pid ?? "", "number"), "worker"),
    cell(line.sqlstate ? `${line.sqlstate} ${line.message ?? ""}` : "", "what"));
  return made;
}

function buttonOf(key) {
  return [...$("lines").querySelectorAll("button.link")].find((button) => button.dataset.key === key);
}

function showTable() {
  const lines = sorted(state.lines.filter(fits)), shown = lines.slice(0, 500);
  const focused = document.activeElement?.dataset?.key;
  $("lines").replaceChildren(...shown.map(row));
  if (focused && !$("job").open) buttonOf(focused)?.focus();
  const notes = lines.length ? [] : [state.lines.length ? "none of the lines fits" : "no job that this login may see is at work, or ended a short while ago"];
  if (lines.length > shown.length) notes.push(`the first ${shown.length} of ${lines.length} lines: narrow them by label or state`);
  if (state.leftOut) notes.push(`${state.leftOut.toLocaleString("en")} more that ended a short while ago are left out here`);
  if (state.notVisible) notes.push(`what ${state.notVisible.toLocaleString("en")} processes of the server are is not visible to this login, and of other owners' jobs it sees the workers at most`);
  $("table-note").textContent = notes.join("; ");
  for (const button of document.querySelectorAll("[data-sort]")) {
    const head = button.closest("th");
    if (button.dataset.sort === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

function showHead(board) {
  $("where").textContent = `${board.database} on PostgreSQL ${board.server_version}`;
  const waiting = board.lines.filter((line) => line.state === "waiting").length;
  const least = board.not_visible ? "at least " : "";
  $("slots-text").textContent = `worker slots: ${least}${board.slots_used} of ${board.slots} used, ${waiting} jobs waiting`;
  const gauge = $("gauge");
  gauge.max = board.slots;
  gauge.high = board.slots * 0.85;
  gauge.value = board.slots_used;
}

async function look() {
  try {
    take(await ask("api/board"));
    $("trouble").textContent = "";
    if ($("job").open && state.open?.at_work) await refreshJob();
  } catch (error) {
    $("trouble").textContent = `What is shown is old: ${error.message}`;
  }
  setTimeout(look, EVERY);
}

function take(board) {
  state.lines = board.lines;
  state.mayCancel = board.may_cancel === true;
  state.slots = board.slots;
  state.leftOut = board.ended_left_out;
  state.notVisible = board.not_visible;
  showHead(board);
  showTable();
}

// The timeline -----------------------------------------------------------------------------------------------------

function colours() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`).trim();
}

// The chart knows no time zones: what it gets is written in the browser's own.
function local(moment) {
  const at = new Date(moment);
  return new Date(at.getTime() - at.getTimezoneOffset() * 60000).toISOString().slice(0, -1);
}

function slotsOverTime(jobs, now) {
  const steps = [];
  for (const job of jobs) {
    const from = job.started_at || job.launched_at;
    if (!from) continue;
    const until = job.ended_at || (job.state === "running" ? now : null);
    if (!until) continue;
    const worth = job.kind === "supervised" ? 2 : 1; // a second worker launches it
    steps.push([from, worth], [until, -worth]);
  }
  steps.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const x = [], y = [];
  let used = 0;
  for (const [at, change] of steps) {
    used += change;
    x.push(local(at));
    y.push(used);
  }
  return { x, y };
}

// What is at work comes first, the longest before the others, then what had the most jobs.
function lanesOf(jobs, by) {
  const since = new Map(), counts = new Map();
  for (const job of jobs) {
    counts.set(job[by], (counts.get(job[by]) ?? 0) + 1);
    if (job.state === "running" || job.state === "waiting") since.set(job[by], Math.min(since.get(job[by]) ?? Infinity, job.launched_at));
  }
  const atWork = [...since.keys()].sort((a, b) => since.get(a) - since.get(b));
  const past = [...counts.keys()].filter((lane) => !since.has(lane)).sort((a, b) => counts.get(b) - counts.get(a));
  const first = MOST_LANES - Math.min(past.length, LANES_OF_PAST);
  return [...atWork.slice(0, first), ...past, ...atWork.slice(first)];
}

function showTimeline() {
  const colour = colours(), by = $("by").value, now = Date.now();
  const jobs = state.jobs.filter(fits).filter((job) => job.launched_at || job.registered_at);
  $("chart").hidden = !jobs.length;
  if (!jobs.length) {
    $("chart-note").textContent = "no jobs that this login may see in this time";
    return;
  }
  const all = lanesOf(jobs, by), lanes = all.slice(0, MOST_LANES).sort().reverse();
  const place = new Map(lanes.map((lane, index) => [lane, index]));
  const bars = (name, chosen, span, more = {}, least = 0) => {
    const trace = { type: "bar", orientation: "h", name, x: [], y: [], base: [], text: [], customdata: [], textposition: "none",
      hovertemplate: "%{text}<extra></extra>", ...more };
    for (const job of chosen) {
      const [from, until] = span(job);
      if (!from || !until || !place.has(job[by]) || until - from < least) continue;
      trace.base.push(local(from));
      trace.x.push(Math.max(until - from, 1));
      trace.y.push(place.get(job[by]));
      trace.customdata.push([job.owner, job.job_id]);
      trace.text.push(escaped(`${job.label}: ${name}, ${took((until - from) / 1000)}`
        + (job.attempt > 1 ? `, try ${job.attempt}` : "") + (job.sqlstate ? `, ${job.sqlstate}` : "")
        + (job.rows !== null ? `, ${job.rows} rows` : "")));
    }
    return trace;
  };
  const traces = [bars("waited, or tried before", jobs, (job) => [job.registered_at, job.started_at || job.launched_at],
    { marker: { color: colour("quiet") }, width: 0.25 }, 1000)];
  for (const name of Object.keys(SIGNS)) {
    const chosen = jobs.filter((job) => job.state === name);
    if (!chosen.length) continue;
    traces.push(bars(name, chosen, (job) => [job.started_at || job.launched_at, job.ended_at || (name === "running" ? now : job.launched_at)],
      { marker: { color: colour(name.replace(" ", "-")) }, width: 0.7 }));
  }
  const used = slotsOverTime(jobs, now);
  traces.push({ type: "scatter", mode: "lines", line: { shape: "hv", color: colour("accent"), width: 1.5 }, fill: "tozeroy", name: "slots used by jobs",
    x: used.x, y: used.y, yaxis: "y2", hovertemplate: "%{y} slots<extra></extra>" });
  const height = Math.max(360, 190 + 22 * lanes.length), slots = 90 / height;
  const layout = {
    barmode: "overlay", paper_bgcolor: colour("ground"), plot_bgcolor: colour("ground"), font: { color: colour("text"), size: 12 },
    height, margin: { l: 10, r: 10, t: 10, b: 50 }, showlegend: true,
    uirevision: `${by} ${$("hours").value}`, // what somebody zoomed into stays
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, hovermode: "closest",
    xaxis: { type: "date", gridcolor: colour("line"), automargin: true, anchor: "y2" },
    yaxis: { tickvals: lanes.map((_, index) => index), ticktext: lanes.map((lane) => escaped(lane.length > 40 ? `…${lane.slice(-39)}` : lane)),
      automargin: true, domain: [slots + 25 / height, 1], gridcolor: colour("line"), range: [-0.7, Math.max(lanes.length - 0.3, 0.7)] },
    yaxis2: { domain: [0, slots], range: [0, Math.max(state.slots, ...used.y) * 1.08 || 1], gridcolor: colour("line"), automargin: true, title: { text: "slots" } },
    shapes: state.slots ? [{ type: "line", xref: "paper", x0: 0, x1: 1, yref: "y2", y0: state.slots, y1: state.slots, line: { color: colour("failed"), dash: "dot", width: 1 } }] : [],
  };
  Plotly.react($("chart"), traces, layout, { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"] });
  if (!$("chart").dataset.listens) {
    $("chart").dataset.listens = "yes";
    $("chart").on("plotly_click", (event) => {
      const job = event.points[0]?.customdata;
      if (job && !FILE) open(job[0], job[1]);
    });
  }
  const left = all.length - lanes.length;
  $("chart-note").textContent = `${jobs.length} jobs` + (left > 0 ? `; ${left} ${by === "label" ? "labels" : "series"} are not drawn` : "")
    + (state.more ? "; older ones are left out" : "") + `; times of ${Intl.DateTimeFormat().resolvedOptions().timeZone}`;
}

// Plotly reads some tags in texts; a label is only text.
function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

// It takes a browser longer than all the rest of the page: the table is there first.
function loadCharts() {
  return new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = "static/plotly.min.js";
    script.addEventListener("load", done);
    script.addEventListener("error", () => failed(new Error("the charts cannot be loaded")));
    document.head.append(script);
  });
}

async function lookBack(once) {
  const number = ++state.asked;
  try {
    const found = await ask(`api/timeline?hours=${encodeURIComponent($("hours").value)}`);
    await state.charts;
    if (number === state.asked) {
      state.jobs = found.jobs;
      state.more = found.more;
      showTimeline();
    }
  } catch (error) {
    $("trouble").textContent = `The timeline is old: ${error.message}`;
  }
  if (!once) setTimeout(lookBack, TIMELINE_EVERY);
}

// One job ----------------------------------------------------------------------------------------------------------

function jobAt(owner, id) {
  return ask(`api/job?owner=${encodeURIComponent(owner)}&id=${encodeURIComponent(id)}`);
}

async function open(owner, id) {
  const dialog = $("job");
  $("job-said").textContent = "";
  try {
    const job = await jobAt(owner, id);
    showJob(job);
    location.hash = `job=${encodeURIComponent(job.owner)}/${encodeURIComponent(id)}`;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  } catch (error) {
    $("trouble").textContent = error.message;
  }
}

// What is at work is looked at again, as long as it is open.
async function refreshJob() {
  const shown = state.open, job = await jobAt(shown.owner, shown.job_id);
  if ($("job").open && state.open === shown) showJob(job);
}

function showJob(job) {
  state.open = { ...job, at_work: job.state === "running" || job.state === "waiting" };
  $("job-label").textContent = job.label;
  $("job-state").textContent = [`${SIGNS[job.state]} ${job.state}`, took(job.seconds), job.progress, job.wanted_by || job.by]
    .filter((part) => part).join(" · ");
  $("job-state").className = job.state.replace(" ", "-");
  const why = job.sqlstate ? `${job.sqlstate} ${job.message ?? ""}` : job.waits_for ? `waits for ${job.waits_for}` : "";
  $("job-why").textContent = why;
  const focused = document.activeElement?.dataset?.key;
  $("job-blocker").replaceChildren(...(job.blocker ? [opener(`Open ${job.blocker.label}, which is in its way`, job.blocker, "blocker")] : []));
  if (focused === "blocker") $("job-blocker").querySelector("button")?.focus();
  const facts = [];
  for (const [name, value] of job.facts) {
    const term = document.createElement("dt"), told = document.createElement("dd");
    term.textContent = name;
    told.textContent = value;
    facts.push(term, told);
  }
  $("facts").replaceChildren(...facts);
  showSql(job);
  showTries(job.tries);
  showKept(job);
  const link = $("job-link");
  link.hidden = !job.link;
  if (job.link) link.href = job.link;
  $("cancel").hidden = !(state.mayCancel && job.can_cancel);
}

function showSql(job) {
  $("sql").hidden = job.sql === null;
  if ($("sql").textContent !== (job.sql ?? "")) $("sql").textContent = job.sql ?? ""; // what is marked in it stays marked
  $("sql-note").textContent = job.sql_note;
}

function showTries(tries) {
  $("tries").tBodies[0].replaceChildren(...tries.map((one) => {
    const made = document.createElement("tr");
    made.append(cell(one.number, "number"), cell(one.launched_at), cell(one.launched_by), cell(one.pid ?? "", "number"),
      cell(one.ended_at), cell(one.how, "what"));
    return made;
  }));
}

function showKept(job) {
  $("kept").hidden = job.kept.length === 0;
  $("kept-note").textContent = job.kept_note;
  $("kept-rows").replaceChildren(...job.kept.flatMap((set) => {
    const told = document.createElement("p");
    const rows = `${set.rows.toLocaleString("en")} row${set.rows === 1 ? "" : "s"} of statement ${set.statement}`;
    told.textContent = set.first.length && set.first.length < set.rows ? `${rows}; the first ${set.first.length}:` : rows;
    if (!set.first.length) return [told];
    const table = document.createElement("table"), head = document.createElement("tr");
    for (const name of set.columns) {
      const column = document.createElement("th");
      column.scope = "col";
      column.textContent = name;
      head.append(column);
    }
    table.createTHead().append(head);
    const body = table.createTBody();
    for (const values of set.first) {
      const line = document.createElement("tr");
      for (const value of values) line.append(value === null ? cell("NULL", "null") : cell(value));
      body.append(line);
    }
    return [told, table];
  }));
}

async function cancel() {
  const job = state.open;
  if (!window.confirm(`Cancel ${job.label} for good?`)) return;
  $("job-said").textContent = "cancelling …";
  try {
    const answer = await fetch("api/cancel", {
      method: "POST", headers: { "content-type": "application/json", "x-pgbg-action": "cancel" },
      body: JSON.stringify({ owner: job.owner, job_id: job.job_id }),
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    await open(job.owner, job.job_id);
    $("job-said").textContent = found.decided === "cancelled" ? "Cancelled; its worker has ended." : "Too late: it is committed.";
  } catch (error) {
    $("job-said").textContent = `Not cancelled: ${error.message}`;
  }
}

function openFromAddress() {
  const found = /^#job=([^/]*)\/(.*)$/.exec(location.hash);
  if (found && !FILE) open(decodeURIComponent(found[1]), decodeURIComponent(found[2]));
  const wanted = /^#find=(.*)$/.exec(location.hash);
  if (wanted) $("pattern").value = decodeURIComponent(wanted[1]);
}

// Beginning --------------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => {
    state.down = state.sort === button.dataset.sort && !state.down;
    state.sort = button.dataset.sort;
    showTable();
  });
}
for (const id of ["pattern", "state", "by"]) $(id).addEventListener("input", () => { showTable(); if (window.Plotly) showTimeline(); });
for (const id of ["choice", "span"]) $(id).addEventListener("submit", (event) => event.preventDefault());
$("close").addEventListener("click", () => $("job").close());
$("job").addEventListener("close", () => {
  history.replaceState(null, "", location.pathname + location.search);
  // The table was drawn anew meanwhile: the focus goes back to where it came from.
  buttonOf(state.opener)?.focus();
});
$("cancel").addEventListener("click", cancel);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (window.Plotly) showTimeline(); });

if (FILE) {
  $("hours").closest("label").hidden = true;
  state.jobs = FILE.jobs;
  state.more = FILE.more;
  take(FILE.board);
  showTimeline();
} else {
  $("hours").addEventListener("input", () => lookBack(true));
  openFromAddress();
  look().finally(() => {
    // After the table was painted.
    state.charts = new Promise((done) => requestAnimationFrame(() => setTimeout(done))).then(loadCharts);
    lookBack(false);
  });
}
