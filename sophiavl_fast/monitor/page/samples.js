"use strict";
(() => {  // everything that a model wrote enters the page as text nodes
  const form = document.getElementById("filters");
  if (!form) return;
  const groups = data("samples"), pictures = data("pictures"), home = document.getElementById("groups"), next = document.getElementById("next");
  const PAGE = 8;
  let found = [], shown = 0;

  const unique = (values, select) => { for (const v of values) select.append($("option", { value: v }, String(v).replaceAll("_", " "))); };
  unique([...new Set(groups.map(g => g.step))], form.elements.step);
  unique([...new Set(groups.map(g => g.type))].filter(Boolean).sort(), form.elements.type);

  const gamma = g => Math.min(...g.responses.map(r => r.gamma ?? 1));
  const text = r => r.raw ?? `${r.thinking_text}\n${r.answer}`;

  function filter() {
    const want = Object.fromEntries(new FormData(form)), needle = want.text.toLowerCase();
    found = [];
    for (const g of groups) {
      if (want.step && String(g.step) !== want.step || want.type && g.type !== want.type || want.mixed && String(g.mixed) !== want.mixed) continue;
      const asked = needle && `${g.prompt} ${g.gold} ${g.id}`.toLowerCase().includes(needle);
      const rows = g.responses.filter(r => (!want.correct || String(r.correct) === want.correct) && (!want.sound || String(r.sound ?? null) === want.sound)
        && (!needle || asked || text(r).toLowerCase().includes(needle)));
      if (rows.length) found.push([g, rows]);
    }
    if (want.order === "late") found.reverse();
    if (want.order === "gamma") found.sort((a, b) => gamma(a[0]) - gamma(b[0]));
    const rows = found.reduce((n, f) => n + f[1].length, 0);
    document.getElementById("count").textContent = found.length ? `${rows.toLocaleString("en-US")} responses in ${found.length.toLocaleString("en-US")} groups` : "Nothing matches.";
    home.replaceChildren();
    shown = 0;
    page();
  }

  function page() {
    for (const [g, rows] of found.slice(shown, shown + PAGE)) home.append(card(g, rows));
    shown += PAGE;
    next.hidden = shown >= found.length;
  }

  function picture(key) {
    const p = pictures[key];
    if (!p.uri) return $("p", {}, p.note);
    const image = $("img", { src: p.uri, alt: "", title: `${p.width} × ${p.height}`, loading: "lazy" });
    if (Math.max(p.width, p.height) <= 256) image.className = "tiny";
    return image;
  }

  function card(g, rows) {
    const one = g.responses[0], scored = g.responses.some(r => r.thinking !== null);
    const meta = [`step ${g.step}`, g.type.replaceAll("_", " "), g.mixed ? "mixed" : g.uniform ? "all outcomes equal" : "one-sided"];
    if (scored) meta.push(`gamma ${compact(gamma(g))}`, `weight ${compact(one.trust_weight)}`);
    meta.push(g.id);
    const head = $("div", { class: "columns" }, ...["", "answer", "reasoning", "sound", "outcome", "thinking", "reward", "advantage"].map((t, i) => $("span", i > 2 ? { class: "num" } : {}, t)));
    return $("article", { class: "group" },
      $("div", { class: "pictures" }, ...(g.images.length ? g.images.map(picture) : [$("p", {}, "text only")])),
      $("div", {}, $("div", { class: "meta" }, ...meta.filter(Boolean).map(t => $("span", {}, t))), $("p", { class: "question" }, g.prompt),
        $("p", { class: "gold" }, "gold ", $("b", {}, g.gold)), head, ...rows.map(response)));
  }

  function advantage(value) {
    const bar = $("div", { class: "adv" });
    if (value) {
      const wide = Math.min(Math.abs(value) / 2.5, 1) * 30;
      bar.append($("i", { style: `left:${value > 0 ? 32 : 32 - wide}px;width:${wide}px;background:var(--${value > 0 ? "good" : "bad"})` }));
    }
    bar.append($("span", {}, value > 0 ? `+${value.toFixed(2)}` : isNumber(value) ? value.toFixed(2) : "–"));
    return bar;
  }

  function response(r) {
    const mark = r.correct === null ? "·" : r.correct ? "✓" : "✗";
    const number = value => $("span", { class: "num" }, isNumber(value) ? value.toFixed(3) : "–");
    const row = $("details", { class: "response" }, $("summary", {},
      $("span", { class: `verdict ${r.correct ? "yes" : "no"}`, title: r.correct ? "correct" : "wrong" }, mark),
      $("span", { class: "answer" }, r.raw === undefined ? r.answer : "(no answer)"), $("span", { class: "preview" }, (r.raw ?? r.thinking_text).slice(0, 300)),
      $("span", { class: "num" }, { true: "yes", false: "no" }[r.sound] ?? "–"), number(r.outcome), number(r.thinking), number(r.total), advantage(r.advantage)));
    row.addEventListener("toggle", () => row.childElementCount === 1 && row.append(body(r)), { once: true });
    return row;
  }

  function body(r) {
    const part = (title, words) => [$("h4", {}, title), $("pre", {}, words)];
    const chip = (label, value) => $("span", {}, `${label} `, $("b", {}, value));
    const judged = { true: "sound", false: "unsound" }[r.sound] ?? "not judged";
    return $("div", { class: "body" }, ...(r.raw === undefined ? [...part("thinking", r.thinking_text), ...part("answer", r.answer)] : part("response, not in the expected format", r.raw)),
      $("div", { class: "chips" }, chip("outcome", compact(r.outcome)), chip("thinking", compact(r.thinking)), chip("gamma", compact(r.gamma)), chip("weight", compact(r.trust_weight)),
        chip("reward", compact(r.total)), chip("advantage", compact(r.advantage)), chip("reasoning", judged), chip("tokens", compact(r.response_tokens) + (r.truncated ? ", truncated" : "")),
        chip("weights of step", compact(r.weight_version)), ...(r.because ? [chip("not scored:", r.because)] : [])));
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", e => e.preventDefault());
  next.addEventListener("click", page);
  filter();
})();
