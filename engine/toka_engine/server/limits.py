"""Checks a request's prompts and sizes against the engine's limits.

Owns: how much one request may ask for. Each refusal is a 400 that names the field. Pure: no I/O, no state.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from toka_engine.config import EngineConfig
from toka_engine.messages import EngineInfo, Int32s
from toka_engine.server.edit_requests import NO_RULES, EncodeWord, TokenRules
from toka_engine.server.errors import ApiError, invalid, no_model
from toka_engine.server.generation_defaults import SamplingDefaults
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.grammar_requests import AskedGrammar
from toka_engine.server.stops import StopStrings
from toka_engine.slot_parameters import Sampling

MAX_REQUEST_OUTPUT_TOKENS = 16 * 1024 * 1024
"""The most output tokens of one request, over all its choices."""
MAX_REQUEST_LOGPROBS = 1024 * 1024
"""The most logprobs in one answer: each is about a hundred bytes of JSON."""

_NO_IDS: Int32s = np.empty(0, np.int32)
_TRUNCATED_TIMES = 16
"""A prompt of ids that is truncated may have so many times the engine's context."""


class GenerationOptions(msgspec.Struct, frozen=True):
    """The checked fields of a request beyond its prompt; `max_tokens` None: as many as fit."""

    num_choices: int
    max_tokens: int | None
    max_tokens_field: str
    sampling: Sampling
    stops: StopStrings | None
    ignores_eos: bool
    is_streamed: bool
    includes_usage: bool
    names_token_ids: bool
    """Whether logprobs name tokens by their ids."""
    reports_usage_each: bool = False
    """Whether every event has the usage of its choice so far."""
    returns_token_ids: bool = False
    adds_special_tokens: bool | None = None
    """Whether the tokenizer's own are added to texts; None: as the endpoint does."""
    truncation: int | None = None
    """A prompt keeps so many of its last tokens; None: all."""
    grammar: AskedGrammar | None = None
    priority: int = 0
    timeout_s: float = 0.0
    rules: TokenRules = NO_RULES
    keeps_stop: bool = False
    """Whether the text keeps what has stopped it."""
    shows_special: bool = False
    """Whether the text shows special tokens."""
    best_of: int = 0
    """The number of choices that are sampled, where it is more than `num_choices`, which are returned; else 0."""
    prompt_logprobs: int = -1
    """The number of likeliest tokens at each position of the prompt; -1: none, nor the logprobs of its tokens."""
    echo_logprobs: int = -1
    """The same for the logprobs of choices that begin with the prompt."""


class Limits:
    """The limits of this engine, as `EngineInfo` and the settings state them."""

    def __init__(
        self,
        config: EngineConfig,
        info: EngineInfo,
        names: Sequence[str],
        end_ids: tuple[int, ...],
        defaults: SamplingDefaults,
        encode_word: EncodeWord,
    ) -> None:
        """`encode_word` gives the tokens of a text without any that the tokenizer adds."""
        self.encode_word = encode_word
        self._max_top_logprobs = min(config.max_topk_logprobs, info.vocab_size)
        self._names = names
        self._end_ids = end_ids
        self.defaults = defaults.complete(info.vocab_size)
        """The sampling parameters of requests that leave a field out."""
        self.vocab_size = info.vocab_size
        self.max_choices = config.max_choices_per_request
        """The most choices of one request, over all its prompts."""
        self.max_request_tokens = min(info.max_request_tokens, info.num_kv_tokens)

    # ------------------------------------------------------------ fields

    def check_model(self, name: str) -> None:
        if name not in self._names:
            raise no_model(name, self._names)

    def max_top_logprobs(self) -> int:
        """Return the most top logprobs per token that a request may ask for."""
        return self._max_top_logprobs

    # ------------------------------------------------------------ prompts

    def check_num_prompts(self, num_prompts: int) -> None:
        if num_prompts > self.max_choices:
            raise invalid("prompt", f"'prompt' has more than {self.max_choices} prompts.")

    def check_texts(self, texts: list[str]) -> list[str]:
        self.check_num_prompts(len(texts))
        for index, text in enumerate(texts):
            if not text:
                raise invalid("prompt", "'prompt' is empty." if len(texts) == 1 else f"'prompt[{index}]' is empty.")
        return texts

    def check_num_ids(self, num_ids: int, *, is_truncated: bool = False) -> None:
        """Refuse a prompt that is too long; one that `is_truncated` may be longer, within reason."""
        if num_ids >= self.max_request_tokens * (_TRUNCATED_TIMES if is_truncated else 1):
            raise self.too_long("prompt", num_ids)

    def check_ids(self, ids: list[int], name: str, *, is_truncated: bool = False) -> Int32s:
        """Return one prompt's ids as an array."""
        if not ids:
            raise invalid("prompt", f"'{name}' is empty.")
        self.check_num_ids(len(ids), is_truncated=is_truncated)
        try:
            array = np.fromiter(ids, np.int32, len(ids))
        except OverflowError:
            array = _NO_IDS
        # As an unsigned number a negative id is too large, too: one pass in numpy in place of two over the list.
        if not array.size or array.view(np.uint32).max() >= self.vocab_size:
            wrong = lowest if (lowest := min(ids)) < 0 else max(ids)
            raise invalid("prompt", f"'{name}' has token id {wrong}; valid are 0 to {self.vocab_size - 1}.")
        return array

    def check_text_size(self, param: str, num_bytes: int, max_bytes: int) -> None:
        """Refuse a text that cannot fit before it is encoded."""
        if num_bytes > max_bytes:
            raise invalid(
                param,
                f"'{param}' has {num_bytes} bytes; at most {self.max_request_tokens - 1} tokens fit.",
                "context_length_exceeded",
            )

    def too_long(self, param: str, num_tokens: int) -> ApiError:
        most = self.max_request_tokens - 1
        message = f"'{param}' has {num_tokens} tokens; at most {most} fit, with room for one more."
        return invalid(param, message, "context_length_exceeded")

    # ------------------------------------------------------------ the whole

    def plan(
        self, options: GenerationOptions, prompts: Sequence[Int32s], param: str, default_tokens: int | None = None
    ) -> GenerationSpec:
        """Check the request as a whole. `param`: the field of the prompt; `default_tokens` None: as many as
        fit.
        """
        lengths = [ids.size for ids in prompts]
        longest = max(lengths)
        room = self.max_request_tokens - longest
        if not min(lengths):
            raise invalid(param, f"'{param}' has no tokens.")
        if room < 1:
            raise self.too_long(param, longest)
        # A request for no token has one sampled, which is not shown.
        max_tokens = min(room, default_tokens or room) if options.max_tokens is None else max(1, options.max_tokens)
        if max_tokens > room:
            raise invalid(
                options.max_tokens_field,
                f"'{options.max_tokens_field}' is {max_tokens}, but {longest} tokens of prompt leave {room} of "
                f"{self.max_request_tokens}.",
                "context_length_exceeded",
            )
        self._check_size(options, len(prompts), max_tokens, param)
        num_prompt_tops = max(options.prompt_logprobs, options.echo_logprobs)
        if num_prompt_tops >= 0:
            self._check_num_prompt_logprobs(options, sum(lengths))
        if options.rules.min_tokens > max_tokens:
            least = options.rules.min_tokens
            raise invalid("min_tokens", f"'min_tokens' is {least}, but at most {max_tokens} tokens are generated.")
        stop_ids = () if options.ignores_eos else self._end_ids
        if options.rules.stop_ids:
            stop_ids = tuple(dict.fromkeys((*stop_ids, *options.rules.stop_ids)))
        sampling = options.sampling
        if options.best_of and sampling.num_logprobs < 0:
            sampling = msgspec.structs.replace(sampling, num_logprobs=0)
        return GenerationSpec(
            num_choices=options.best_of or options.num_choices,
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
            deliver_each=options.is_streamed or options.stops is not None,
            is_streamed=options.is_streamed,
            priority=options.priority,
            timeout_s=options.timeout_s,
            grammar=None if options.grammar is None else self.complete_grammar(options.grammar).source,
            edits=None if options.rules is NO_RULES else options.rules.make_edits(stop_ids),
            delivers_stop=options.keeps_stop,
            prompt_logprobs=num_prompt_tops,
        )

    @staticmethod
    def check_fits_grammar(options: GenerationOptions, param: str) -> None:
        """Refuse what no text of a grammar may satisfy. `param`: the field that asks for the grammar."""
        if options.ignores_eos:
            raise invalid("ignore_eos", f"'ignore_eos' excludes '{param}', whose texts have an end.")
        for name, given in (("min_tokens", options.rules.min_tokens), ("allowed_token_ids", options.rules.allowed_ids)):
            if given:
                raise invalid(name, f"'{name}' excludes '{param}', which may have no such text.")

    def complete_grammar(self, asked: AskedGrammar) -> AskedGrammar:
        """Return `asked` with the tokens that end its texts."""
        return AskedGrammar(msgspec.structs.replace(asked.source, end_ids=self._end_ids), asked.param)

    def _check_size(self, options: GenerationOptions, num_prompts: int, max_tokens: int, param: str) -> None:
        num_sampled = options.best_of or options.num_choices
        num_choices = num_prompts * num_sampled
        if num_choices > self.max_choices:
            name = "best_of" if options.best_of else "n"
            raise invalid(
                name if num_sampled > 1 else param,
                f"{num_prompts} prompts times {name}={num_sampled} are more than {self.max_choices} choices.",
            )
        if num_choices * max_tokens > MAX_REQUEST_OUTPUT_TOKENS:
            raise invalid(
                options.max_tokens_field,
                f"{num_choices} choices of {max_tokens} tokens are more than one answer may hold.",
            )
        num_logprobs = 1 + options.sampling.num_logprobs
        if num_choices * max_tokens * num_logprobs > MAX_REQUEST_LOGPROBS:
            raise invalid("logprobs", f"The answer could hold more than {MAX_REQUEST_LOGPROBS} logprobs.")

    @staticmethod
    def _check_num_prompt_logprobs(options: GenerationOptions, num_prompt_tokens: int) -> None:
        num_tokens = num_prompt_tokens * options.num_choices
        for name, num_tops in (("prompt_logprobs", options.prompt_logprobs), ("logprobs", options.echo_logprobs)):
            if num_tokens * (1 + num_tops) > MAX_REQUEST_LOGPROBS:
                raise invalid(name, f"The answer would hold more than {MAX_REQUEST_LOGPROBS} logprobs of prompts.")


def int_in(value: int | None, name: str, lowest: int, highest: int, default: int) -> int:
    """Return `value`, or `default` for null. Raises a 400 that names the field and its range."""
    if value is None:
        return default
    if not lowest <= value <= highest:
        raise invalid(name, f"'{name}' must be from {lowest} to {highest}.", "invalid_value")
    return value
