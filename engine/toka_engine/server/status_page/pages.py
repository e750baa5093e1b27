"""The HTML of the status page. Every value is escaped by the template engine; nothing comes from outside the server."""

from __future__ import annotations

import functools
import json

import jinja2
import msgspec
from markupsafe import Markup

from toka_engine.server.status_page.content import Content, State
from toka_engine.server.status_page.plots import HEIGHT, WIDTH
from toka_engine.server.status_page.script import SCRIPT
from toka_engine.server.status_page.style import STYLE

_CONTENT = """
<div id="content" data-word="{{ state.word }}" data-kind="{{ state.kind }}" data-detail="{{ state.detail }}"
  data-models="{{ models_json }}" data-batches="{{ "true" if has_batches else "false" }}">
{%- macro list_facts(facts, kind) %}
<dl class="{{ kind }}">
  {%- for fact in facts %}<div><dt>{{ fact.name }}</dt><dd>{{ fact.value }}</dd></div>{% endfor -%}
</dl>
{%- endmacro %}
<section class="card" aria-labelledby="load-title">
  <h2 id="load-title">Load now</h2>
  {{- list_facts(load, "numbers") }}
  {%- if facts %}{{ list_facts(facts, "facts") }}{% endif %}
  {%- if key_facts %}{{ list_facts(key_facts, "facts") }}{% endif %}
</section>
<section class="card" aria-labelledby="plots-title">
  <h2 id="plots-title">Last ten minutes</h2>
  <div class="plots">
  {%- for plot in plots %}
    <figure>
      <figcaption><h3>{{ plot.title }}</h3><strong>{{ plot.shown }}</strong></figcaption>
      <svg viewBox="0 0 {{ width }} {{ height }}" preserveAspectRatio="none" role="img"
        aria-label="{{ plot.description }}">
        {%- for part in (0, 0.5, 1) %}
        <line class="grid" x1="0" x2="{{ width }}" y1="{{ height * part }}" y2="{{ height * part }}"/>
        {%- endfor %}
        {%- if plot.line %}
        <polygon class="area" points="{{ plot.area }}"/>
        <polyline class="line" points="{{ plot.line }}"/>
        {%- endif %}
      </svg>
      <div class="axis" aria-hidden="true"><span>10 min ago</span><span>top {{ plot.top }}</span><span>now</span></div>
    </figure>
  {%- endfor %}
  </div>
</section>
<section class="card" aria-labelledby="batches-title">
  <h2 id="batches-title">Your batches</h2>
  {%- if batches %}
  <div class="scroll" tabindex="0" role="region" aria-labelledby="batches-title">
  <table>
    <thead><tr><th scope="col">Batch</th><th scope="col">Endpoint</th><th scope="col">State</th>
      <th scope="col">Progress</th><th scope="col">Created</th></tr></thead>
    <tbody>
    {%- for batch in batches %}
    <tr>
      <td><code>{{ batch.id }}</code>{% if batch.note %}<div class="note">{{ batch.note }}</div>{% endif %}</td>
      <td><code>{{ batch.endpoint }}</code></td>
      <td><span class="pill {{ batch.kind }}">{{ batch.status }}</span></td>
      <td>
        {%- if batch.total %}<progress max="{{ batch.total }}" value="{{ batch.done }}"
          aria-label="Progress of {{ batch.id }}"></progress>{% endif -%}
        {{ "{:,}".format(batch.done) }} of {{ "{:,}".format(batch.total) }}
        {%- if batch.failed %}, {{ "{:,}".format(batch.failed) }} failed{% endif %}</td>
      <td>{{ batch.begun }}</td>
    </tr>
    {%- endfor %}
    </tbody>
  </table>
  </div>
  {%- else %}
  <p class="soft">{{ no_batches }}</p>
  {%- endif %}
</section>
</div>
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style nonce="{{ nonce }}">{{ style }}</style>
</head>
<body data-asks-key="{{ "true" if asks_key else "false" }}">
<a class="skip" href="#playground">To the playground</a>
<header>
  <h1 id="name">{{ name }}</h1>
  <span id="state" class="pill {{ state.kind }}" role="status">{{ state.word }}</span>
  <span id="detail" class="soft">{{ state.detail }}</span>
  <span class="version">toka {{ state.version }}</span>
</header>
<main>
<noscript><p class="card">Without its script this page shows the state when it was loaded, and has no playground.</p>
</noscript>
{%- macro key_form(words) %}
<form id="key-form">
  <p class="soft">{{ words }} It is kept in this tab alone, until the tab is closed.</p>
  <div class="row">
    <label>API key <input id="key-input" type="password" required autocomplete="off" spellcheck="false"
      maxlength="1024"></label>
    <button class="main">Use this key</button>
  </div>
  <p id="key-error" class="error" role="alert"></p>
</form>
{%- endmacro %}
{%- if asks_key %}
<section id="key" class="card" aria-labelledby="key-title">
  <h2 id="key-title">API key</h2>
  {{- key_form("This engine asks for a key.") }}
</section>
{%- endif %}
<div id="live">{{ content }}</div>
{%- if not asks_key %}
<details id="key" class="card" {{- " hidden" if not has_batches }}><summary>Batches that were sent with a key</summary>
  {{- key_form("This engine asks for no key, and shows batches to the key that they were sent with.") }}
</details>
{%- endif %}
<section id="playground" class="card" aria-labelledby="playground-title" {{- " hidden" if asks_key }}>
  <h2 id="playground-title">Playground</h2>
  <div id="talk" role="log" aria-live="polite" tabindex="0" aria-label="Conversation"></div>
  <form id="chat">
    <details class="settings"><summary>Settings</summary>
      <div class="row actions">
        <label>Model <select id="model">
          {%- for name in models %}<option value="{{ name }}">{{ name }}</option>{% endfor -%}
        </select></label>
        <label>Most tokens <input id="max_tokens" type="number" min="1" step="1" value="512"
          inputmode="numeric"></label>
        <label>Temperature <input id="temperature" type="number" min="0" max="2" step="0.1" inputmode="decimal"
          placeholder="the model's own"></label>
      </div>
      <label class="actions">System message <input id="system" type="text" autocomplete="off"></label>
    </details>
    <label>Message <textarea id="prompt" rows="3" placeholder="Ask the model"></textarea></label>
    <div class="row actions">
      <button id="send" class="main">Send</button>
      <button id="stop" type="button" disabled>Stop</button>
      <button id="clear" type="button">New chat</button>
      <span class="soft small">Enter sends, Shift+Enter begins a line</span>
    </div>
  </form>
</section>
</main>
<footer>
  <a href="docs">API reference</a> <a href="openapi.json">OpenAPI document</a> <a href="metrics">Metrics</a>
  <button id="forget" type="button" hidden>Forget the key</button>
</footer>
<script nonce="{{ nonce }}">{{ script }}</script>
</body>
</html>
"""


@functools.cache
def _template(text: str) -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text)


def render_content(content: Content) -> str:
    """Return the part of the page that changes, which the page's script fetches."""
    parts = {name: getattr(content, name) for name in content.__struct_fields__}
    return _template(_CONTENT).render(parts, models_json=json.dumps(content.models), width=WIDTH, height=HEIGHT)


def render_page(state: State, content: Content | None, nonce: str) -> str:
    """Return the whole page; without `content` it asks for a key, and shows what the probes show."""
    models = content.models if content is not None else ()
    return _template(_PAGE).render(
        state=msgspec.structs.asdict(state),
        name=models[0] if models else "toka",
        title=f"{models[0]} – toka" if models else "toka",
        models=models,
        has_batches=content is not None and content.has_batches,
        asks_key=content is None,
        content=Markup(render_content(content)) if content is not None else "",
        nonce=nonce,
        style=Markup(STYLE),
        script=Markup(SCRIPT),
    )
