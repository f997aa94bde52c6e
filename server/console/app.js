// The console: what serves, how tasks relate, and a place to try a text. No library, no build, nothing from elsewhere.

const $ = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const isSvg = ["svg", "g", "line", "circle", "text", "title"].includes(name);
  const made = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

async function call(path, body) {
  const headers = { "content-type": "application/json" };
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  const answer = await response.json();
  if (!response.ok && path !== "/ready") throw new Error(answer.detail ?? answer.error?.message ?? response.statusText);
  return answer;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const composedOf = (weights, most = 4) => {
  const rows = Object.entries(weights);
  const shown = rows.slice(0, most).map(([name, weight]) => `${name} ${percent(weight)}`).join(", ");
  return rows.length > most ? `${shown}, and ${rows.length - most} more` : shown;
};

function bars(rows) {
  const box = element("div", { class: "bars" });
  for (const [name, share] of rows)
    box.append(element("span", {}, name), element("meter", { min: 0, max: 1, value: share, "aria-label": name }), element("span", {}, percent(share)));
  return box;
}

function showAnswer(output) {
  const adapters = output.composition.adapters.map((one) => [`${one.name}@${one.version}`, Math.max(0, one.weight)]);
  const isText = output.text !== undefined;
  return element("div", { class: "answer" },
    element("div", {}, `${output.task}: `, isText ? output.text : element("strong", {}, output.label)),
    bars(Object.entries(output.scores ?? {})),
    element("div", {}, adapters.length ? "composed of" : "bare backbone"), bars(adapters));
}

async function answer(event) {
  event.preventDefault();
  const tasks = [...document.querySelectorAll("#choices input:checked")].map((box) => box.value);
  try {
    if (!tasks.length) throw new Error("choose a task");
    const reply = await call("/v1/infer", { inputs: [{ tasks, text: $("text").value }], options: { mode: $("mode").value } });
    $("answers").replaceChildren(...reply.outputs.map(showAnswer));
  } catch (error) {
    $("answers").replaceChildren(element("p", { class: "error" }, error.message));
  }
}

function drawGraph(tasks) {
  const place = Object.fromEntries(tasks.map((task, i) => {
    const angle = (2 * Math.PI * i) / tasks.length - Math.PI / 2;
    return [task.task, [170 * Math.cos(angle), 150 * Math.sin(angle)]];
  }));
  const lines = [], nodes = [];
  for (const task of tasks)
    for (const [other, weight] of Object.entries(task.prior))
      if (other !== task.task && place[other]) {
        const [[x1, y1], [x2, y2]] = [place[task.task], place[other]];
        lines.push(element("line", { x1, y1, x2, y2, "stroke-width": 12 * weight, "stroke-opacity": .35, "data-from": task.task }));
      }
  for (const task of tasks) {
    const [x, y] = place[task.task];
    const side = x < -20 ? "end" : x > 20 ? "start" : "middle";
    const label = element("text", { x: x + (x < -20 ? -14 : x > 20 ? 14 : 0), y: y + (Math.abs(x) <= 20 ? Math.sign(y) * 22 : 4), "text-anchor": side }, task.task);
    const node = element("g", { tabindex: 0, role: "button", "aria-label": `${task.task}: ${composedOf(task.prior, 99)}` },
      element("circle", { cx: x, cy: y, r: 8 }), label, element("title", {}, composedOf(task.prior, 99)));
    node.addEventListener("click", () => choose(task.task, node));
    node.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(task.task, node); });
    nodes.push(node);
  }
  $("graph").replaceChildren(...lines, ...nodes);
}

function choose(task, node) {
  document.querySelectorAll("#graph g").forEach((other) => other.classList.toggle("chosen", other === node));
  document.querySelectorAll("#graph line").forEach((line) => line.setAttribute("stroke-opacity", line.dataset.from === task ? .9 : .1));
}

const row = (...cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));

async function load() {
  try {
    const ready = await call("/ready");
    $("status").textContent = `${ready.ready ? "ready" : ready.reason}: ${ready.backbone}, ${ready.dtype} on ${ready.device}, ` +
      `${ready.adapters} adapters, ${ready.tasks} tasks, graph version ${ready.graph_version}`;
    const { tasks } = await call("/v1/tasks");
    const { adapters } = await call("/v1/adapters");
    $("choices").replaceChildren(...tasks.filter((task) => task.answers).map((task, i) => {
      const box = element("input", { type: "checkbox", value: task.task });
      box.checked = task.task === "books" || i === 0;
      return element("label", {}, box, ` ${task.task}`);
    }));
    drawGraph(tasks);
    $("prior").tBodies[0].replaceChildren(...tasks.map((task) => row(task.task, task.answers === "text" ? "text" : task.labels.join(", "), composedOf(task.prior))));
    $("adapters").tBodies[0].replaceChildren(...adapters.map((one) => row(one.name, one.task, one.kind, one.versions.join(", "),
      Object.entries(one.aliases).map(([alias, version]) => `${alias} → ${version}`).join(", "), one.resident.join(", ") || "–")));
  } catch (error) {
    $("status").textContent = error.message;
  }
}

$("try").addEventListener("submit", answer);
$("key").addEventListener("change", load);
load();
