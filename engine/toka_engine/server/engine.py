"""The parts of the server that exist once the engine has started, and how they are made.

Owns: what is loaded from the model's folders, here and in the processes that prepare large requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from toka_engine.config import EngineConfig
from toka_engine.grammar.protocol import Setup
from toka_engine.messages import EngineInfo, Int32s
from toka_engine.server.answers import AnswerFormat
from toka_engine.server.chat_template import ChatTemplate, find_end_ids, load_chat_template
from toka_engine.server.dialect import Dialect, find_dialect
from toka_engine.server.generate import GenerationJob
from toka_engine.server.generation_defaults import SamplingDefaults, read_sampling_defaults
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.grammar_checks import GrammarChecks
from toka_engine.server.limits import GenerationOptions, Limits
from toka_engine.server.prompt_logprobs import NO_PROMPT_LOGPROBS, PromptLogprobForms
from toka_engine.server.prompts import PromptEncoder
from toka_engine.server.reading import Asker
from toka_engine.server.render import EmptyRenderer, Renderer, TrackingRenderer
from toka_engine.server.tokenization import Tokenizer
from toka_engine.version import __version__


class Engine(msgspec.Struct, frozen=True):
    """The parts that exist once the engine has started."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    limits: Limits
    dialect: Dialect
    fingerprint: str
    """The `system_fingerprint` of answers: equal where version, model and number format are."""
    grammar_checks: GrammarChecks

    def make_encoder(self, options: GenerationOptions, asker: Asker) -> PromptEncoder:
        """Return what encodes the prompts of one request."""
        return PromptEncoder(
            self.tokenizer,
            self.limits,
            asker,
            adds_special_tokens=options.adds_special_tokens,
            truncation=options.truncation,
        )

    def make_job(
        self,
        prompts: Sequence[Int32s],
        spec: GenerationSpec,
        options: GenerationOptions,
        form: Callable[..., AnswerFormat],
        model: str,
        echoes: Sequence[str] = (),
    ) -> GenerationJob:
        """Return the checked request, ready to run; `form` writes its answer."""
        return GenerationJob(
            prompts,
            spec,
            form(
                model,
                self.tokenizer.label_of,
                has_logprobs=options.sampling.num_logprobs >= 0,
                num_top=options.sampling.num_logprobs,
                includes_usage=options.includes_usage or options.reports_usage_each,
                names_token_ids=options.names_token_ids,
                fingerprint=self.fingerprint,
                prompts=prompts if options.returns_token_ids else None,
                num_choices=options.num_choices,
                is_streamed=options.is_streamed,
            ),
            self.renderer_maker(options, self.tokenizer.bytes_of),
            options.is_streamed,
            options.includes_usage,
            options.reports_usage_each,
            echoes,
            options.num_choices,
            NO_PROMPT_LOGPROBS
            if spec.prompt_logprobs < 0
            else PromptLogprobForms(
                self.tokenizer.bytes_of, self.tokenizer.label_of, options.echo_logprobs, options.prompt_logprobs
            ),
        )

    def renderer_maker(self, options: GenerationOptions, bytes_of: Sequence[bytes]) -> Callable[[], Renderer]:
        """Return what makes the renderer of a choice; `bytes_of`: the bytes that each token shows."""
        if options.max_tokens == 0:
            return lambda: EmptyRenderer(bytes_of)
        if options.shows_special:
            bytes_of = self.tokenizer.bytes_with_specials
        keeps_tokens = options.sampling.num_logprobs >= 0 or options.returns_token_ids or bool(options.best_of)
        if options.stops is None and not keeps_tokens:
            return partial(Renderer, bytes_of)
        return lambda: TrackingRenderer(
            bytes_of,
            options.stops,
            keeps_tokens=keeps_tokens,
            keeps_stop=options.keeps_stop,
            min_tokens=options.rules.min_tokens,
        )


def fingerprint_of(config: EngineConfig, info: EngineInfo) -> str:
    """Return the `system_fingerprint` of an engine: a hash of what decides about its numbers."""
    parts = (__version__, config.model, config.revision, info.device, info.dtype, info.vocab_size)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Folders(msgspec.Struct, frozen=True):
    """The folders with the model's files."""

    model_dir: str
    tokenizer_dir: str


class Loaded(NamedTuple):
    """The parts that come from files."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_ids: tuple[int, ...]
    defaults: SamplingDefaults


def load(config: EngineConfig, folders: Folders) -> Loaded:
    """Load the files. Raises ModelInvalidError."""
    model_dir, tokenizer_dir = Path(folders.model_dir), Path(folders.tokenizer_dir)
    tokenizer = Tokenizer(tokenizer_dir)
    template = load_chat_template(tokenizer_dir, tokenizer.special_texts)
    end_ids = find_end_ids(model_dir, tokenizer_dir, tokenizer.id_of)
    is_wanted = config.generation_config == "auto"
    defaults = read_sampling_defaults(model_dir) if is_wanted else SamplingDefaults()
    return Loaded(tokenizer, template, end_ids, defaults)


def make_engine(
    config: EngineConfig, names: Sequence[str], info: EngineInfo, folders: Folders, loaded: Loaded
) -> Engine:
    """Put the parts together. Raises ModelInvalidError."""
    tokenizer, template, end_ids, defaults = loaded
    tokenizer.cover(info.vocab_size)
    return Engine(
        tokenizer,
        template,
        Limits(config, info, names, end_ids, defaults, tokenizer.encode_word),
        find_dialect(config, template, tokenizer),
        fingerprint_of(config, info),
        GrammarChecks(Setup(folders.tokenizer_dir, info.vocab_size, end_ids)),
    )
