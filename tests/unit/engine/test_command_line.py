"""`key=value` to settings: what is taken, what is refused, and with which words."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import tomllib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_engine.command_line import format_help, parse_config, parse_number
from toka_engine.config import ALIASES, UNSUPPORTED_KEYS, EngineConfig
from toka_engine.errors import ConfigError, ExitCode
from toka_engine.logs import level_of

from tests.engine_process import ROOT

KEYS_OF_TOKASAURUS = [
    "model",
    "tokenizer",
    "trust_remote_code",
    "dtype",
    "rope_scaling",
    "use_hydragen",
    "hydragen_min_group_size",
    "hydragen_min_prefix_len",
    "enable_chosen_logprobs",
    "max_topk_logprobs",
    "port",
    "log_level",
    "log_procs",
    "uvicorn_log_level",
    "stats_report_seconds",
    "statsd_addr",
    "statsd_server_url",
    "local_proc_name",
    "dmanager",
    "dmodel",
    "uvsh",
    "page_size",
    "kv_cache_num_tokens",
    "torch_compile",
    "torch_compile_config",
    "async_tp_threshold",
    "max_tokens_per_forward",
    "max_seqs_per_forward",
    "prefill_round_up_multiple",
    "scheduling_steps_ahead",
    "stop_string_num_token_lookback",
    "dp_size",
    "pp_size",
    "tp_size",
    "pp_num_buffer_stages",
    "track_early_stopping",
    "early_stopping_buffer_size",
    "early_stopping_num_prediction_buckets",
    "early_stopping_initial_wait",
    "early_stopping_init_mean",
    "early_stopping_init_std",
    "max_num_tokens_per_request",
    "enable_precise_onboard",
    "precise_onboard_batch_size",
    "greedy_prefill",
    "use_spec_allocation",
    "spec_allocation_std_buffer_scale",
    "spec_allocation_target_kv_cache_utilization",
    "use_cudagraphs",
    "cudagraph_max_size",
    "cudagraph_step",
    "cudagraph_max_kv_indices_per_seq",
    "allocator_sanity_checks",
]


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("port=8000", "port", 8000),
        ("port=(8000 + 1)", "port", 8001),
        ("kv_cache_num_tokens=(512 * 1024)", "kv_cache_num_tokens", 524288),
        ("kv_cache_num_tokens=(2 ** 20 // 3 - 1)", "kv_cache_num_tokens", 349524),
        ("kv_cache_num_tokens=None", "kv_cache_num_tokens", None),
        ("max_seqs_per_forward=1e3", "max_seqs_per_forward", 1000),
        ("use_hydragen=T", "use_hydragen", True),
        ("use_hydragen=False", "use_hydragen", False),
        ("drain_timeout_s=1.5", "drain_timeout_s", 1.5),
        ("target_gap_ms=12.5", "target_gap_ms", 12.5),
        ("target_gap_ms=None", "target_gap_ms", None),
        ("drain_timeout_s=(60 / 8)", "drain_timeout_s", 7.5),
        ("model=a=b", "model", "a=b"),
        ("model_aliases=a,b", "model_aliases", ("a", "b")),
        ("model_aliases=('a', \"b\")", "model_aliases", ("a", "b")),
        ("model_aliases=[]", "model_aliases", ()),
        ("log_level=DEBUG", "log_level", "DEBUG"),
        ("torch_compile=T", "torch_compile", True),
        ("quantization=fp8", "quantization", "fp8"),
        ("torch_compile_config=default", "torch_compile_config", "default"),
        ("served_model_name=None", "served_model_name", None),
    ],
)
def test_a_value_is_read_by_its_keys_type(argument: str, key: str, value: object) -> None:
    assert getattr(parse_config([argument]), key) == value


@pytest.mark.parametrize(
    "argument",
    [
        "port=0",
        "port=65536",
        "port=-1",
        "port=x",
        "port=",
        "port=None",
        "port=80.5",
        "target_gap_ms=-1",
        "target_gap_ms=60001",
        "target_gap_ms=nan",
        "target_gap_ms=x",
        "port=nan",
        "port=inf",
        "port=T",
        "port=(1",
        "port=(1/0)",
        "port=(2**2**9)",
        "port=(9**64**1)",
        "port=(True)",
        "port=(1j)",
        "port=(__import__('os').getpid())",
        "port=(lambda: 1)",
        "port=(" + "1+" * 200 + "1)",
        "use_hydragen=1",
        "use_hydragen=yes",
        "dtype=float16",
        "device=tpu",
        "log_level=LOUD",
        "receive_timeout_s=0",
        "receive_timeout_s=nan",
        "drain_timeout_s=-1",
        "drain_timeout_s=inf",
        "page_size=0",
        "seed=-1",
        "seed=(2**63)",
        "model=",
        "model=" + "x" * 2000,
        "num_threads=0",
        "max_queued_requests=(2**40)",
        "torch_compile=default",
        "quantization=int8",
        "torch_compile_config=reduce-overhead",
        "torch_compile_config=max-autotune",
        "torch_compile_config=",
    ],
)
def test_a_bad_value_is_refused_with_its_key(argument: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config([argument])
    assert str(refusal.value).startswith(argument.partition("=")[0] + "=")
    assert "expected: " in str(refusal.value)


def test_an_unknown_key_is_refused_with_the_closest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'kv_cache_tokens' \(did you mean 'kv_cache_num_tokens'\?\)"):
        parse_config(["kv_cache_tokens=5"])


def test_an_unknown_key_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(ConfigError, match="unknown key 'zzz'; the keys are in: toka --help"):
        parse_config(["zzz=5"])


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="port is given twice"):
        parse_config(["port=1", "port=2"])


def test_a_word_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'serve' is not key=value"):
        parse_config(["serve"])


@pytest.mark.parametrize("key", KEYS_OF_TOKASAURUS)
def test_every_key_of_tokasaurus_has_an_effect_or_a_sentence(key: str) -> None:
    assert (ALIASES.get(key, key) in EngineConfig.__struct_fields__) != (key in UNSUPPORTED_KEYS)


def test_an_unbuilt_key_is_refused_with_its_sentence() -> None:
    with pytest.raises(ConfigError, match="prefill_round_up_multiple has no effect here and is refused: prefill chun"):
        parse_config(["prefill_round_up_multiple=2"])


def test_the_other_name_of_a_key_is_that_key() -> None:
    assert parse_config(["statsd_server_url=udp://statsd:8125"]).statsd_addr == "udp://statsd:8125"
    with pytest.raises(ConfigError, match="statsd_addr is given twice"):
        parse_config(["statsd_server_url=a:1", "statsd_addr=b:2"])
    wrong_ones = ["statsd", "statsd:", ":8125", "statsd:0", "statsd:x", "statsd:70000", "http://statsd:8125", "a:1/b"]
    for wrong in (*wrong_ones, "stats..d:8125", f"{'s' * 64}:8125"):
        with pytest.raises(ConfigError, match=r"statsd_addr=.*host:port"):
            parse_config([f"statsd_addr={wrong}"])


def test_the_processes_that_log_are_named() -> None:
    assert parse_config(["tp_size=2", "log_procs=server,model_tp1"]).log_procs == ("server", "model_tp1")
    with pytest.raises(ConfigError, match="log_procs=servr: there is no such process; there are supervisor, resolve"):
        parse_config(["log_procs=servr"])
    for name in ("model_tp2", "model_tp1_dp0", "manager_dp0", "server_x", "model_"):
        with pytest.raises(ConfigError, match=f"log_procs={name}: .* manager, model, model_tp0, model_tp1$"):
            parse_config(["tp_size=2", f"log_procs={name}"])


def test_processes_that_are_not_named_only_warn() -> None:
    config = EngineConfig(log_procs=("server", "model_tp1"), log_level="DEBUG")
    levels = {name: level_of(config, name) for name in ("server", "manager", "model_tp1", "model_tp0", "server_x")}
    assert levels == {
        "server": "DEBUG", "manager": "WARNING", "model_tp1": "DEBUG", "model_tp0": "WARNING", "server_x": "DEBUG",
    }  # fmt: skip
    assert level_of(EngineConfig(log_procs=("server",), log_level="ERROR"), "manager") == "ERROR"
    assert level_of(EngineConfig(), "manager") == "INFO"


def test_an_unbuilt_key_may_say_what_is_done_anyway() -> None:
    assert parse_config(["pp_size=1", "trust_remote_code=F"]) == EngineConfig()


def test_what_does_not_work_with_several_ranks_is_refused_by_name() -> None:
    assert parse_config(["tp_size=8"]).tp_size == 8
    with pytest.raises(ConfigError, match="torch_compile=T does not work with quantization=fp8"):
        parse_config(["quantization=fp8", "torch_compile=T"])
    with pytest.raises(ConfigError, match="torch_compile=T does not work with tp_size=2 yet"):
        parse_config(["tp_size=2", "torch_compile=T"])
    for refused in ("tp_size=0", "tp_size=9"):
        with pytest.raises(ConfigError, match=refused):
            parse_config([refused])


def test_settings_of_gpus_are_refused_where_they_have_no_effect() -> None:
    assert parse_config([]).async_tp_threshold is None
    assert parse_config(["tp_size=2", "async_tp_threshold=4096"]).async_tp_threshold == 4096
    for arguments, words in (
        (["async_tp_threshold=2"], "async_tp_threshold=2 has no effect with tp_size=1"),
        (["tp_size=2", "async_tp_threshold=2", "device=cpu"], "async_tp_threshold=2 has no effect with device=cpu"),
        (["tp_size=2", "async_tp_threshold=0"], "async_tp_threshold=0"),
        (["cudagraph_max_prefill_size=9", "use_cudagraphs=F"], "prefill_size=9 has no effect with use_cudagraphs=F"),
        (["cudagraph_max_prefill_size=9", "device=cpu"], "cudagraph_max_prefill_size=9 has no effect with device=cpu"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_config(arguments)


def test_the_sizes_of_a_pipeline_fit_each_other() -> None:
    config = parse_config(["pp_size=2", "tp_size=2", "pp_layer_split=17,15", "pp_num_buffer_stages=0"])
    assert (config.pp_layer_split, config.num_ranks, config.num_lanes) == ((17, 15), 4, 2)
    assert parse_config(["pp_size=3"]).num_lanes == 4
    assert (EngineConfig().num_lanes, EngineConfig().pp_layer_split) == (1, None)
    for arguments, words in (
        (["pp_size=2", "torch_compile=T"], "torch_compile=T does not work with pp_size=2 yet: it needs pp_size=1"),
        (["pp_size=3", "pp_layer_split=17,15"], "pp_layer_split=17,15 has the layers of 2 stages, pp_size=3"),
        (["pp_layer_split=17,15"], "pp_layer_split=17,15 has the layers of 2 stages, pp_size=1"),
        (["pp_size=2", "pp_layer_split=17,x"], "pp_layer_split=17,x: not a number"),
        (["pp_size=2", "pp_layer_split=17,0"], "pp_layer_split=17,0"),
        (["pp_num_buffer_stages=2"], "pp_num_buffer_stages=2 has no effect with pp_size=1"),
        (["dp_size=2", "pp_size=5"], "dp_size=2 x pp_size=5 x tp_size=1 are more than 8 model workers"),
        (["pp_size=9"], "pp_size=9"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_config(arguments)


def test_a_minimum_of_replicas_is_at_most_their_number() -> None:
    assert parse_config(["dp_size=2", "dp_min_size=2"]).dp_min_size == 2
    for arguments in (["dp_min_size=2"], ["dp_size=3", "dp_min_size=4"]):
        with pytest.raises(ConfigError, match=r"dp_min_size=[24] is more than dp_size=[13]"):
            parse_config(arguments)
    with pytest.raises(ConfigError, match=r"dp_size=3 x tp_size=3 are more than 8 model workers"):
        parse_config(["dp_size=3", "tp_size=3"])
    for refused in ("dp_size=0", "dp_size=9", "dp_min_size=0"):
        with pytest.raises(ConfigError, match=refused):
            parse_config([refused])


def test_a_mode_of_torch_compile_is_refused_without_it() -> None:
    mode = "torch_compile_config=max-autotune-no-cudagraphs"
    with pytest.raises(ConfigError, match=f"{mode} has no effect without torch_compile=T"):
        parse_config([mode])
    assert parse_config([mode, "torch_compile=T"]).torch_compile_config == "max-autotune-no-cudagraphs"


def test_code_from_a_model_folder_is_never_allowed() -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        parse_config(["trust_remote_code=T"])


def test_the_help_tells_each_key_with_type_default_and_meaning() -> None:
    text = format_help()
    for key in EngineConfig.__struct_fields__:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {key} (")]
        assert ") = " in line
    assert "  port (integer >= 1 <= 65535) = 10210\n      port to listen on" in text
    assert "\n      \n" not in text


def test_the_settings_survive_the_wire_with_their_bounds() -> None:
    config = parse_config(["model_aliases=a,b", "port=81", "dtype=float32"])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"port": 0}), type=EngineConfig)


OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}
trees = st.recursive(
    st.integers(0, 99),
    lambda inner: st.tuples(inner, st.sampled_from(sorted(OPERATORS)), inner),
    max_leaves=8,
)


def spell(tree: Any) -> str:
    return f"({spell(tree[0])} {tree[1]} {spell(tree[2])})" if isinstance(tree, tuple) else str(tree)


def compute(tree: Any) -> int | float:
    return OPERATORS[tree[1]](compute(tree[0]), compute(tree[2])) if isinstance(tree, tuple) else tree


@given(trees)
def test_arithmetic_in_brackets_means_what_it_means_in_python(tree: Any) -> None:
    text = f"({spell(tree)})"
    try:
        expected = compute(tree)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="arithmetic fails"):
            parse_number(text)
        return
    assert parse_number(text) == expected


@given(st.text(max_size=60))
def test_any_text_in_brackets_is_a_number_or_a_value_error(text: str) -> None:
    try:
        assert isinstance(parse_number(f"({text})"), int | float)
    except ValueError:
        return


@given(st.sampled_from(EngineConfig.__struct_fields__), st.text(max_size=30))
def test_any_value_is_taken_or_refused_by_name(key: str, text: str) -> None:
    words = ""
    try:
        parse_config([f"{key}={text}"])
    except ConfigError as error:
        words = str(error)
    assert words == "" or words.startswith(f"{key}=")


def toka(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "engine")}
    return subprocess.run(
        [sys.executable, "-m", "toka_engine", *arguments], env=env, capture_output=True, text=True, timeout=60
    )


def test_a_bad_key_ends_the_command_with_one_clear_line() -> None:
    result = toka("prot=80")
    assert result.returncode == ExitCode.CONFIG_INVALID
    assert result.stderr == (
        "toka: ConfigInvalid: unknown key 'prot' (did you mean 'port'?); the keys are in: toka --help\n"
    )


def test_help_and_version_are_printed_without_starting_anything() -> None:
    assert toka("--help").stdout.startswith("usage: toka ")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert toka("--version").stdout == f"toka {version}\n"


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    result = toka(f"host={host}")
    assert result.returncode == ExitCode.CONFIG_INVALID
    assert host in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("model", "code"), [("/no/such/folder", ExitCode.MODEL_NOT_FOUND), ("builtin://x", ExitCode.MODEL_NOT_FOUND)]
)
def test_a_model_that_is_not_there_is_told_before_anything_starts(model: str, code: ExitCode) -> None:
    result = toka(f"model={model}", "host=127.0.0.1", "port=19999")
    assert result.returncode == code
    assert model in result.stderr
    assert "event=started" not in result.stderr
