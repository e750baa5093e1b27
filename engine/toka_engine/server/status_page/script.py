"""The script of the status page: it keeps the page fresh and streams the playground's chat.

It keeps the API key in sessionStorage alone, which ends with the tab, and writes whatever comes from a model as text.
"""

SCRIPT = """
"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const asksKey = document.body.dataset.asksKey === "true";
  const KEY = "toka-api-key";
  const REFRESH_MS = 5000;
  let key = recall();

  function recall() {
    try { return sessionStorage.getItem(KEY) || ""; } catch { return ""; }
  }
  function remember(value) {
    key = value;
    try {
      if (value) sessionStorage.setItem(KEY, value); else sessionStorage.removeItem(KEY);
    } catch { /* without storage the key lives as long as the page */ }
    find("forget").hidden = !value;
  }
  const withKey = (headers) => (key ? { ...headers, authorization: "Bearer " + key } : headers);
  const isHeader = (text) => /^[\\x21-\\x7e\\xa0-\\xff]+$/.test(text);

  function showState(word, kind, detail) {
    const pill = find("state");
    if (pill.textContent !== word) pill.textContent = word;
    pill.className = "pill " + kind;
    find("detail").textContent = detail;
  }

  // ---------------------------------------------------------------- what is live

  async function refresh() {
    if (document.hidden) return;
    if (asksKey && !key) return readProbe();
    let answer, text;
    try {
      answer = await fetch("status", { headers: withKey({}), cache: "no-store" });
      text = await answer.text();
    } catch {
      return showState("No answer", "bad", "the server cannot be reached");
    }
    if (answer.status === 401) {
      remember("");
      return lock("This key is not accepted.");
    }
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("content");
    const live = find("live");
    showState(fresh.dataset.word, fresh.dataset.kind, fresh.dataset.detail);
    nameModels(JSON.parse(fresh.dataset.models));
    const chosen = getSelection();
    if (chosen.isCollapsed || !live.contains(chosen.anchorNode)) live.replaceChildren(fresh);
    find("playground").hidden = false;
    find("key").hidden = asksKey || fresh.dataset.batches !== "true";
    find("key-error").textContent = "";
  }

  async function readProbe() {
    try {
      const state = await (await fetch("readyz", { cache: "no-store" })).json();
      const word = state.ready ? "Ready" : state.phase[0].toUpperCase() + state.phase.slice(1);
      showState(word, state.ready ? "good" : state.phase === "failing" ? "bad" : "wait", state.detail);
    } catch {
      showState("No answer", "bad", "the server cannot be reached");
    }
  }

  function nameModels(names) {
    find("name").textContent = names[0];
    const select = find("model");
    if ([...select.options].map((option) => option.value).join() === names.join()) return;
    select.replaceChildren(...names.map((name) => new Option(name, name)));
  }

  function lock(words) {
    find("live").replaceChildren();
    find("name").textContent = "toka";
    find("playground").hidden = asksKey;
    find("key").hidden = false;
    find("key-error").textContent = words;
    readProbe();
  }

  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = find("key-input").value.trim();
    if (!isHeader(given)) return void (find("key-error").textContent = "This cannot be a key.");
    find("key-input").value = "";
    remember(given);
    refresh();
  });
  find("forget").addEventListener("click", () => {
    remember("");
    if (asksKey) lock(""); else refresh();
  });

  // ---------------------------------------------------------------- the playground

  const talk = find("talk"), input = find("prompt");
  let turns = [], stopping = null;

  function addTurn(role) {
    const turn = document.createElement("div");
    turn.className = "turn " + role;
    const part = (name) => {
      const element = document.createElement("div");
      element.className = name;
      turn.append(element);
      return element;
    };
    const parts = { turn, thought: part("thought"), text: part("text"), cost: part("cost") };
    talk.append(turn);
    return parts;
  }
  const append = (element, text) => {
    const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    element.append(text);
    if (follows) talk.scrollTop = talk.scrollHeight;
  };

  function request() {
    const system = find("system").value.trim();
    const body = {
      model: find("model").value,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
      stream: true,
      stream_options: { include_usage: true },
    };
    for (const name of ["max_tokens", "temperature"]) {
      if (find(name).value !== "") body[name] = Number(find(name).value);
    }
    return JSON.stringify(body);
  }

  async function* readEvents(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\\n\\n");
      rest = events.pop();
      for (const event of events) {
        if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
      }
    }
  }

  async function ask() {
    const began = performance.now();
    const shown = addTurn("assistant");
    const asked = turns;  // "New chat" puts others in their place
    let text = "", first = 0, usage = null;
    try {
      const headers = withKey({ "content-type": "application/json" });
      const options = { method: "POST", headers, body: request(), signal: stopping.signal };
      const answer = await fetch("v1/chat/completions", options);
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      for await (const event of readEvents(answer)) {
        if (event.error) throw new Error(event.error.message);
        usage = event.usage || usage;
        const delta = event.choices.length ? event.choices[0].delta : {};
        const thought = delta.reasoning_content || delta.reasoning;
        if (!first && (thought || delta.content)) first = performance.now();
        if (thought) append(shown.thought, thought);
        if (delta.content) {
          text += delta.content;
          append(shown.text, delta.content);
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        shown.turn.classList.add("failed");
        append(shown.text, (text ? "\\n" : "") + error.message);
      }
    }
    if (text) asked.push({ role: "assistant", content: text }); else asked.pop();
    append(shown.cost, describe(began, first, usage));
  }

  function describe(began, first, usage) {
    if (!first) return "";
    const seconds = (performance.now() - first) / 1000;
    const words = ["first token after " + ((first - began) / 1000).toFixed(2) + " s"];
    if (usage) {
      words.push(usage.prompt_tokens + " + " + usage.completion_tokens + " tokens");
      if (usage.completion_tokens > 1 && seconds > 0) {
        words.push(((usage.completion_tokens - 1) / seconds).toFixed(0) + " tokens/s");
      }
    } else {
      words.push("stopped");
    }
    return words.join(" \\u00b7 ");
  }

  find("chat").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = input.value.trim();
    if (!text || stopping) return;
    input.value = "";
    turns.push({ role: "user", content: text });
    append(addTurn("user").text, text);
    talk.scrollTop = talk.scrollHeight;
    stopping = new AbortController();
    find("send").disabled = true;
    find("stop").disabled = false;
    talk.setAttribute("aria-busy", "true");
    await ask();
    stopping = null;
    talk.setAttribute("aria-busy", "false");
    find("send").disabled = false;
    find("stop").disabled = true;
    refresh();
  });
  find("stop").addEventListener("click", () => stopping && stopping.abort());
  find("clear").addEventListener("click", () => {
    if (stopping) stopping.abort();
    turns = [];
    talk.replaceChildren();
    input.focus();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("chat").requestSubmit();
  });

  find("forget").hidden = !key;
  if (asksKey && !key) lock("");
  refresh();
  setInterval(refresh, REFRESH_MS);
  document.addEventListener("visibilitychange", refresh);
})();
"""
