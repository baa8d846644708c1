// The page of a run: report.py puts this file, page.html and the data into one file. No library, nothing is
// fetched. Text from data only ever becomes a text node (`make`), so that markup in a sample is words to
// read.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);

// An element with text and children; the one place where elements are made.
function make(tag, className, text, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== null && text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

// Four digits are enough to compare; a missing number is a dash.
function number(x) {
  if (typeof x !== "number") return "\u2013";
  return Number.isInteger(x) || Math.abs(x) >= 1000 ? x.toFixed(0) : String(Number(x.toPrecision(4)));
}

// Three digits, for where there is little room.
const short = x => Number.isInteger(x) || Math.abs(x) >= 1000 ? number(x) : String(Number(x.toPrecision(3)));

// A name with places where it may be broken.
const breakable = name => name.replaceAll("_", "_\u200b");

// --------------------------------------------------------------------------------------------------- colours

// A value as a colour: red at the lower end of the scale, white at its neutral value, blue at the upper end.
// Each half is stretched by itself, since the neutral value need not lie in the middle.
function colour(x, [low, neutral, high]) {
  if (typeof x !== "number") return "rgb(200, 200, 200)";
  const half = x < neutral ? neutral - low : high - neutral;
  const at = half > 0 ? Math.max(-1, Math.min(1, (x - neutral) / half)) : 0;
  const place = (at + 1) / 2 * (data.palette.length - 1),
    i = Math.min(Math.floor(place), data.palette.length - 2);
  const mix = data.palette[i].map((c, j) => Math.round(c + (data.palette[i + 1][j] - c) * (place - i)));
  return `rgb(${mix.join(", ")})`;
}

// What is read off a row for a quantity, a number a token. True errors are 0 or -1, so that they come out
// red.
function values(row, quantity) {
  if (quantity === "errors") return row.errors && row.errors.map(wrong => wrong ? -1 : 0);
  return row[quantity];
}

// ------------------------------------------------------------------------------------------- order and pairs

const mean = list => {
  const known = list.filter(x => typeof x === "number");
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};
const scoreOf = row => typeof row.score === "number" ? row.score : row.mean;

// A preference as the reward is fitted to it: rounded to multiples of the run's --resolution, so that near
// ones tie.
const level = row => typeof row.preference === "number" && sample().resolution > 0
  ? Math.round(row.preference / sample().resolution) : row.preference;

// [pairs that the reward's score puts the other way round than the preference, all pairs of unequal
// preference]
function disagreement(rows) {
  let wrong = 0, pairs = 0;
  for (const better of rows) for (const worse of rows) {
    if (!(level(better) > level(worse))) continue;  // false for a missing preference, too
    pairs += 1;
    if (!(scoreOf(better) > scoreOf(worse))) wrong += 1;
  }
  return [wrong, pairs];
}

// A stable order from high to low, what has no number last.
function sorted(list, key) {
  const at = x => { const k = key(x); return typeof k === "number" ? k : -Infinity; };
  const placed = list.map((x, i) => [x, at(x), i]);
  return placed.sort((a, b) => a[1] === b[1] ? a[2] - b[2] : b[1] - a[1]).map(x => x[0]);
}

const KEYS = {mean: row => row.mean, score: scoreOf, preference: row => row.preference,
  wrong: row => row.preference};
const share = group => {
  const [wrong, pairs] = disagreement(group.rows);
  return pairs ? wrong / pairs : -1;
};

function ordered(groups, by) {
  if (!by) return groups;
  const inside = groups.map(group => ({...group, rows: sorted(group.rows, KEYS[by])}));
  return sorted(inside, by === "wrong" ? share : group => mean(group.rows.map(KEYS[by])));
}

// Places of two token lists side by side: [[i, j], ...], null for a gap. The longest common subsequence stays
// together; what lies between is paired up place by place, so that a word and its replacement share a column.
// Lists of equal length are paired place by place throughout, as prompts are made of places, unless far less
// would be common to them so.
function align(a, b) {
  const n = a.length, m = b.length, out = [];
  let before = 0, behind = 0;
  while (before < n && before < m && a[before] === b[before]) before += 1;
  while (behind < Math.min(n, m) - before && a[n - 1 - behind] === b[m - 1 - behind]) behind += 1;
  const common = [...Array(before).keys()].map(i => [i, i]).concat(
    middle(before, n - behind, before, m - behind),
    [...Array(behind).keys()].map(i => [n - behind + i, m - behind + i]), [[n, m]]);
  const places = a.map((_, k) => [k, k]), same = places.filter(([k]) => a[k] === b[k]).length;
  if (n === m && common.length - 1 <= 2 * same + 1) return places;
  let i = 0, j = 0;
  for (const [p, q] of common) {
    while (i < p || j < q) out.push([i < p ? i++ : null, j < q ? j++ : null]);
    if (p < n) out.push([i++, j++]);
  }
  return out;

  function middle(i0, i1, j0, j1) {
    const h = i1 - i0, w = j1 - j0, found = [];
    if (!h || !w || h * w > 1e6) return found;
    const best = Array.from({length: h + 1}, () => new Uint16Array(w + 1));
    for (let i = h - 1; i >= 0; i--) for (let j = w - 1; j >= 0; j--)
      best[i][j] = a[i0 + i] === b[j0 + j] ? best[i + 1][j + 1] + 1
        : Math.max(best[i + 1][j], best[i][j + 1]);
    for (let i = 0, j = 0; i < h && j < w;) {
      if (a[i0 + i] === b[j0 + j]) found.push([i0 + i++, j0 + j++]);
      else if (best[i + 1][j] >= best[i][j + 1]) i += 1; else j += 1;
    }
    return found;
  }
}

// ---------------------------------------------------------------------------------------------------- tokens

const NAMES = {rewards: "r", weights: "weight", log_ratio: "log \u03c0 \u2212 log \u03c0\u2080",
  errors: "true errors"};
const state = {run: 0, step: 0, quantity: "rewards", sort: "", beside: false};
const sample = () => data.samples[state.run];
const cards = new Map();

// A token; what it shows is filled in by `paint`. Only the first of a row is a tab stop, arrow keys go on
// from there.
function token(card, rowIndex, i, text) {
  const span = make("span", "t", text === "" ? "\u2205" : text);
  span.tabIndex = i === 0 ? 0 : -1;
  card.spans.push([span, rowIndex, i]);
  return span;
}

function meta(card, rowIndex) {
  const line = make("div", "meta");
  card.metas.push([line, rowIndex]);
  return line;
}

function pair(card, group, better, rowIndex) {
  const top = group.rows[better], row = group.rows[rowIndex], box = make("div", "pair");
  for (const [i, j] of align(top.tokens, row.tokens)) {
    const differs = i === null || j === null || top.tokens[i] !== row.tokens[j];
    const cell = (r, k, tokens) => k === null ? make("span", "gap", "\u2013") : token(card, r, k, tokens[k]);
    box.append(make("span", differs ? "differs" : "", null, cell(better, i, top.tokens),
      cell(rowIndex, j, row.tokens)));
  }
  return make("div", "row", null, meta(card, better), meta(card, rowIndex), box);
}

function plain(card, group, rowIndex) {
  const line = make("div", "tokens");
  group.rows[rowIndex].tokens.forEach((text, i) => line.append(token(card, rowIndex, i, text)));
  return make("div", "row", null, meta(card, rowIndex), line);
}

// The best of a group, if another row is worse than it: the one that the others stand beside.
function bestOf(group) {
  const known = group.rows.map(level).filter(x => typeof x === "number");
  if (known.length < 2 || Math.max(...known) === Math.min(...known)) return -1;
  return group.rows.findIndex(row => level(row) === Math.max(...known));
}

function build(group) {
  const card = {spans: [], metas: [], wrong: make("span", "soft")};
  card.node = make("article", "card", null,
    make("div", "head", null, make("strong", "", group.title), card.wrong));
  for (const name of ["context", "reference"])
    if (group[name]) card.node.append(make("p", "context", `${name}: ${group[name]}`));
  const best = state.beside ? bestOf(group) : -1;
  group.rows.forEach((_, i) => {
    if (best < 0) card.node.append(plain(card, group, i));
    else if (i !== best) card.node.append(pair(card, group, best, i));
  });
  return card;
}

// Colours and numbers of a card that stands already: where only these change, the colours move softly.
function paint(card, group) {
  const scale = sample().scales[state.quantity], [wrong, pairs] = disagreement(group.rows);
  card.wrong.textContent = pairs ? `${wrong} of ${pairs} pairs not ordered as the preference does` : "";
  for (const [span, r, i] of card.spans) {
    const row = group.rows[r], list = values(row, state.quantity);
    span.style.backgroundColor = colour(list ? list[i] : null, scale.range);
    span.classList.toggle("error", Boolean(row.errors && row.errors[i]));
    span.about = {row, i};
  }
  for (const [line, r] of card.metas) {
    const row = group.rows[r];
    line.replaceChildren(make("b", "", row.role || "sample"),
      make("span", "", `preference ${number(row.preference)}`),
      make("span", "", `mean r ${number(row.mean)}`),
      ...(typeof row.score === "number" ? [make("span", "", `score ${number(row.score)}`)] : []));
  }
}

function show() {
  const view = sample().steps[state.step], box = $("cards");
  $("step").value = state.step;
  $("at").textContent = `step ${number(view.step)} (${state.step + 1}/${sample().steps.length})`;
  $("step").setAttribute("aria-valuetext", $("at").textContent);
  const nodes = ordered(view.groups, state.sort).map(group => {
    const shape = JSON.stringify([state.run, state.beside, state.beside && bestOf(group), group.context,
      group.reference,
      group.title, group.rows.map(row => row.tokens)]);
    let card = cards.get(group.id);
    if (!card || card.shape !== shape) card = Object.assign(build(group), {shape});
    cards.set(group.id, card);
    paint(card, group);
    return card.node;
  });
  if (nodes.length !== box.children.length
    || nodes.some((node, i) => node !== box.children[i])) box.replaceChildren(...nodes);
  const [wrong, pairs] = view.groups.map(g => disagreement(g.rows)).reduce(
    ([a, b], [c, d]) => [a + c, b + d], [0, 0]);
  $("order").textContent = pairs
    ? `Here the reward orders ${pairs - wrong} of ${pairs} pairs of siblings as the preference does.` : "";
  legend();
  extra(view);
}

function legend() {
  const scale = sample().scales[state.quantity], [low, neutral, high] = scale.range, bar = make("i");
  const stops = [...Array(13).keys()].map(
    i => i < 6 ? low + (neutral - low) * i / 6 : neutral + (high - neutral) * (i - 6) / 6);
  bar.style.background = `linear-gradient(90deg, ${stops.map(x => colour(x, scale.range)).join(", ")})`;
  $("scale").replaceChildren(make("span", "", scale.ends[0]), bar, make("span", "", scale.ends[1]));
  $("scale-text").textContent = scale.text;
}

// ------------------------------------------------------------------------------------- vocabulary and credit

function cell(value) {
  const td = make("td", "c", number(value));
  td.style.backgroundColor = colour(value, sample().scales.rewards.range);
  return td;
}

function tableOf(title, said, header, rows) {
  const table = make("table", "", null, make("tr", "", null, ...header.map(text => make("th", "", text))));
  for (const row of rows) table.append(make("tr", "", null, ...row));
  return make("div", "card", null, make("strong", "", title), make("p", "soft", said), table);
}

function extra(view) {
  const boxes = (view.vocabulary || []).map(v => tableOf("The vocabulary by reward",
    v.prefix.length ? `r of each word as the next one after \u201c${v.prefix.join("").trim()}\u201d`
      : "r of each word as the first one",
    ["highest", "r", "lowest", "r"], [...Array(Math.max(v.top.length, v.bottom.length)).keys()].map(i =>
      [v.top[i], v.bottom[i]].flatMap(x => x ? [make("td", "", x[0]), cell(x[1])]
        : [make("td"), make("td")]))));
  for (const c of view.credit || []) boxes.push(tableOf("Who gets the credit",
    "mean r of a new cue word and of a token that is no cue, after so many cue words",
      ["cue words before", "a new cue word", "no cue"],
    c.cues.map((n, i) => [make("td", "", number(n)), cell(c.cue[i]), cell(c.other[i])])));
  $("extra").replaceChildren(...boxes);
}

// ------------------------------------------------------------------------------------------- small multiples

function draw(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// A figure over steps. The picture is stretched to its place (its strokes are not), the numbers beside it are
// text, so that both can be read at any width.
function chart(figure) {
  const points = figure.groups.flatMap(g => [...g.runs, g.mean]).flat();
  const ends = list => list.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
  const [x0, x1] = ends(points.map(p => p[0])), [y0, y1] = ends(points.map(p => p[1]));
  const px = x => x1 > x0 ? (x - x0) / (x1 - x0) * 100 : 50,
    py = y => y1 > y0 ? 94 - (y - y0) / (y1 - y0) * 88 : 50;
  const picture = draw("svg", {viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img",
    "aria-label": `${figure.name}, from ${short(y0)} to ${short(y1)}`});
  const line = (list, k, width, opacity) => {
    // a single point: a line of no length, a dot
    const at = list.map(p => `${px(p[0]).toFixed(2)},${py(p[1]).toFixed(2)}`);
    picture.append(draw("polyline",
      {points: (at.length === 1 ? [at[0], at[0]] : at).join(" "), fill: "none", opacity,
      stroke: data.colours[k % data.colours.length], "stroke-width": at.length === 1 ? 6 : width}));
  };
  figure.groups.forEach((g, k) => g.runs.length > 1 && g.runs.forEach(list => line(list, k, 1, .4)));
  figure.groups.forEach((g, k) => g.mean.length && line(g.mean, k, 2, 1));
  const cursor = draw("path", {class: "cursor", d: "", fill: "none"}), readout = make("output"),
    first = figure.groups.find(g => g.mean.length);
  picture.append(cursor);
  const rest = () => {
    cursor.setAttribute("d", "");
    readout.textContent = first ? short(first.mean[first.mean.length - 1][1]) : "";
  };
  picture.addEventListener("pointermove", event => {
    const box = picture.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * 100;
    const near = figure.groups.map(g => sorted(g.mean, p => -Math.abs(px(p[0]) - x))[0]).filter(Boolean);
    if (!near.length) return;
    cursor.setAttribute("d", `M${px(near[0][0])} 0V100`);
    readout.textContent = `${near.map(p => short(p[1])).join(" / ")} at ${number(near[0][0])}`;
  });
  picture.addEventListener("pointerleave", rest);
  rest();
  const said = (name, ...texts) => make("div", name, null, ...texts.map(text => make("span", "", text)));
  return make("figure", "chart", null,
    make("figcaption", "", null, make("span", "", breakable(figure.name)), readout),
    make("div", "plot", null, said("ys", short(y1), y1 > y0 ? short(y0) : ""), picture,
      said("xs", number(x0), x1 > x0 ? number(x1) : "")));
}

// ------------------------------------------------------------------------------------------- the fixed parts

function fixed() {
  document.title = data.title;
  $("title").textContent = data.title;
  $("what").textContent = data.what;
  $("lead").textContent = data.lead;
  $("states").append(...data.states.map(([text, ended]) =>
    make("span", ended ? "state" : "state open", text)));
  $("warnings").append(...data.warnings.map(text => make("p", "warning", text)));
  $("tiles").append(...data.tiles.map(([name, value]) =>
    make("div", "", null, make("dt", "", breakable(name)), make("dd", "", value))));
  for (const {title, rows: [header, ...rows]} of data.tables)
    $("table").append(make("h3", "", title),
      make("table", "", null, make("tr", "", null, ...header.map(text => make("th", "", text))),
      ...rows.map(row => make("tr", "", null, ...row.map(text => make("td", "", text))))));
  $("keys").append(...(data.groups.length > 1 ? data.groups : []).map((text, k) => {
    const mark = make("i");
    mark.style.background = data.colours[k % data.colours.length];
    return make("li", "", null, mark, text);
  }));
  $("curves").hidden = !data.curves.length;
  $("curves-note").textContent = data.curvesNote;
  for (const phase of data.curves) $("curves").append(make("h3", "", phase.phase),
    make("div", "charts", null, ...phase.figures.map(chart)));
  for (const run of data.runs) {
    const list = items => make("ul", "settings", null,
      ...items.map(([k, v, changed]) => make("li", changed ? "changed" : "", `${k} = ${v}`)));
    const box = make("details", "", null, make("summary", "", run.name), list(run.settings));
    if (run.figures.length) box.append(make("h3", "", "figures"), list(run.figures));
    box.open = data.runs.length === 1;
    $("runs").append(box);
  }
  $("notes").append(...data.notes.map(text => make("p", "", text)));
}

function tip(span) {
  const {row, i} = span.about, lines = [`${row.tokens[i]}   (token ${i + 1} of ${row.tokens.length})`];
  for (const name of ["rewards", "weights", "log_ratio"])
    if (row[name]) lines.push(`${NAMES[name]}  ${number(row[name][i])}`);
  if (row.errors) lines.push(row.errors[i] ? "a true error" : "no true error");
  $("tip").textContent = lines.join("\n");
  $("tip").hidden = false;
  const at = span.getClientRects()[0] || span.getBoundingClientRect(),
    size = $("tip").getBoundingClientRect();
  $("tip").style.left = `${Math.max(6, Math.min(at.left, innerWidth - size.width - 6))}px`;
  $("tip").style.top = `${at.top - size.height - 8 > 4 ? at.top - size.height - 8 : at.bottom + 8}px`;
}

function listen() {
  const on = (id, event, action) => $(id).addEventListener(event, action),
    hide = () => { $("tip").hidden = true; };
  on("step", "input", event => { state.step = Number(event.target.value); stop(); show(); });
  on("sort", "change", event => { state.sort = event.target.value; show(); });
  on("beside", "change", event => { state.beside = event.target.checked; show(); });
  on("quantity", "change", event => { state.quantity = event.target.value; show(); });
  on("run", "change", event => { state.run = Number(event.target.value); choose(); });
  for (const event of ["pointerover", "focusin"])
    on("cards", event, e => e.target.about ? tip(e.target) : hide());
  for (const event of ["pointerleave", "focusout"]) on("cards", event, hide);
  addEventListener("scroll", hide, {passive: true});
  on("cards", "keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key], here = event.target;
    if (event.key === "Escape") hide();
    if (!step || !here.about) return;
    const row = [...here.closest(".row").querySelectorAll(".t")].filter(
      span => span.about.row === here.about.row);
    const next = row[row.indexOf(here) + step];
    if (next) next.focus();
    event.preventDefault();
  });
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; $("play").textContent = "Play"; };
  on("play", "click", () => {
    if (timer) return stop();
    if (state.step === sample().steps.length - 1) state.step = 0;
    show();
    $("play").textContent = "Pause";
    timer = setInterval(() => {
      if (state.step < sample().steps.length - 1) { state.step += 1; show(); }
      if (state.step >= sample().steps.length - 1) stop();
    }, 800);
  });
}

// A run to look at: its last evaluation, the quantities that it has, pairs where siblings share most of their
// tokens.
function choose() {
  const {steps, scales} = sample(), known = Object.keys(NAMES).filter(name => scales[name]);
  cards.clear();
  $("cards").replaceChildren();
  state.step = steps.length - 1;
  if (!known.includes(state.quantity)) state.quantity = known[0];
  $("quantity").replaceChildren(make("legend", "", "colour"), ...known.map(name => {
    const input = make("input");
    Object.assign(input, {type: "radio", name: "quantity", value: name, checked: name === state.quantity});
    return make("label", "pick", null, input, make("span", "", NAMES[name]));
  }));
  $("step").max = steps.length - 1;
  $("step").disabled = $("play").disabled = steps.length < 2;
  state.beside = $("beside").checked = sample().beside;
  show();
}

fixed();
$("look").hidden = !data.samples.length;
$("none").hidden = Boolean(data.samples.length);
if (data.samples.length) {
  listen();
  $("of-run").hidden = data.samples.length < 2;
  $("run").append(...data.samples.map((s, i) => Object.assign(make("option", "", s.run), {value: i})));
  choose();
}
