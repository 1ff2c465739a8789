"""EngineArgs from Python and from the command line."""

from __future__ import annotations

import argparse
import dataclasses
from enum import Enum
from pathlib import Path

import pytest

from furiosa_llm.args import MAX_NUM_SEQS, AsyncEngineArgs, EngineArgs
from furiosa_llm.errors import DeviceError, InvalidRequestError

FIELDS = [
    "model", "num_speculative_tokens", "use_speculative_decoding_if_possible",
    "data_parallel_size", "tokenizer", "tokenizer_mode", "seed", "devices", "cache_dir", "backend",
    "paged_attention_num_blocks", "npu_queue_limit", "max_processing_samples", "spare_blocks_ratio",
    "is_offline", "speculative_model_paged_attention_num_blocks", "packing_type",
]  # fmt: skip
FLAGS = [
    "--model", "--num-speculative-tokens", "--tokenizer", "--tokenizer-mode", "--seed", "--devices",
    "--data-parallel-size", "--cache-dir", "--backend", "--paged-attention-num-blocks",
    "--npu-queue-limit", "--max-processing-samples", "--spare-blocks-ratio", "--is-offline",
    "--use-speculative-decoding-if-possible", "--speculative-model-paged-attention-num-blocks",
    "--packing-type",
]  # fmt: skip
OURS = [
    "weights", "kv_cache_dtype", "block_size", "kv_cache_memory", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "tensor_parallel_size",
]  # fmt: skip


def parser():
    return EngineArgs.add_cli_args(argparse.ArgumentParser(exit_on_error=True))


def from_cli(*arguments, cls=EngineArgs):
    return cls.from_cli_args(parser().parse_args(["--model", "m", *arguments]))


class Backend(Enum):
    """As LLM programs hand it over: an enum, not a string."""

    RT = "furiosa_rt_v2"
    MOCK = "mock_backend_v2"
    CUDA = "furiosa_rt_cuda"


def test_field_order():
    assert [field.name for field in dataclasses.fields(EngineArgs)] == FIELDS + OURS
    assert dataclasses.fields(AsyncEngineArgs)[-1].name == OURS[-1]


def test_furiosa_fields_may_be_positional_and_ours_may_not():
    values = ["m", None, False, 2, "t", "slow", 7, "npu:0", "/c", "numpy", 8, 1, 4, 0.5, True, None]
    args = EngineArgs(*values, "IDENTITY")
    assert [getattr(args, name) for name in FIELDS] == [
        *values[:8], Path("/c"), *values[9:], "IDENTITY",
    ]  # fmt: skip
    with pytest.raises(TypeError):
        EngineArgs(*values, "IDENTITY", "fp32")


def test_flag_order():
    groups = {group.title: group for group in parser()._action_groups}
    upstream = [a.option_strings[0] for a in groups["options"]._group_actions]
    assert upstream == ["-h", *FLAGS]
    ours = [a.option_strings[0] for a in groups["furiosa-serve"]._group_actions]
    assert ours == ["--" + name.replace("_", "-") for name in OURS]


def test_add_cli_args_returns_the_parser():
    given = argparse.ArgumentParser()
    assert AsyncEngineArgs.add_cli_args(given) is given


def test_the_command_line_has_the_defaults_of_the_constructor(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert from_cli() == EngineArgs(model="m")
    assert EngineArgs(model="m").cache_dir == Path("/cache/furiosa/llm")
    assert isinstance(from_cli(cls=AsyncEngineArgs), AsyncEngineArgs)


@pytest.mark.parametrize("base", [None, "", "relative"])
def test_default_cache_dir_without_xdg(monkeypatch, base):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if base is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert EngineArgs(model="m").cache_dir == Path("/home/me/.cache/furiosa/llm")


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        pytest.param("--tokenizer", "dir", "dir", id="tokenizer"),
        pytest.param("--seed", "-5", -5, id="seed"),
        pytest.param("--devices", "npu:1,npu:0", "npu:1,npu:0", id="devices"),
        pytest.param("--data-parallel-size", "4", 4, id="dp"),
        pytest.param("--cache-dir", "/c", Path("/c"), id="cache dir"),
        pytest.param("--backend", "NumPy", "numpy", id="backend in any case"),
        pytest.param("--backend", "FURIOSA_RT_NPU", "native", id="backend alias npu"),
        pytest.param("--backend", "furiosa_rt_v2", "native", id="backend alias v2"),
        pytest.param("--backend", "MOCK_BACKEND_V2", "mock", id="backend alias mock"),
        pytest.param("--paged-attention-num-blocks", "9", 9, id="blocks"),
        pytest.param("--packing-type", "identity", "IDENTITY", id="packing"),
        pytest.param("--weights", "INT4", "int4", id="weights"),
        pytest.param("--kv-cache-dtype", "bf16", "bf16", id="kv dtype"),
        pytest.param("--block-size", "32", 32, id="block size"),
        pytest.param("--kv-cache-memory", "4096", 4096, id="bytes"),
        pytest.param("--kv-cache-memory", "512MiB", 512 << 20, id="MiB"),
        pytest.param("--kv-cache-memory", "2GB", 2 * 10**9, id="GB"),
        pytest.param("--kv-cache-memory", "1.5 gib", 3 << 29, id="a part of a GiB"),
        pytest.param("--kv-cache-memory", "64B", 64, id="B"),
        pytest.param("--max-model-len", "64", 64, id="max model len"),
        pytest.param("--max-num-seqs", "3", 3, id="max num seqs"),
        pytest.param("--max-num-batched-tokens", "5", 5, id="max num batched tokens"),
        pytest.param("--tensor-parallel-size", "2", 2, id="tp"),
        pytest.param("--seed", "None", None, id="None is None"),
    ],
)
def test_flag(flag, text, value):
    got = getattr(from_cli(flag, text), flag.lstrip("-").replace("-", "_"))
    assert (got, type(got)) == (value, type(value))


# The defects of Furiosa-LLM 2024.2.1 that these arguments do not have.


@pytest.mark.parametrize("name", ["is_offline", "use_speculative_decoding_if_possible"])
@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("false", False), ("False", False), ("yes", True), ("no", False),
     ("1", True), ("0", False), (None, True)],
)  # fmt: skip
def test_a_boolean_flag_means_what_it_says(name, text, value):
    flag = "--" + name.replace("_", "-")
    got = getattr(from_cli(flag, *([] if text is None else [text])), name)
    assert got is value


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [("--npu-queue-limit", "8", 8), ("--max-processing-samples", "64", 64),
     ("--spare-blocks-ratio", "0.5", 0.5)],
)  # fmt: skip
def test_a_scheduler_flag_keeps_its_value_and_needs_no_file(flag, text, value):
    got = getattr(from_cli(flag, text), flag.lstrip("-").replace("-", "_"))
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("mode", ["slow", "SLOW", "Slow"])
def test_tokenizer_mode_is_slow_in_any_case(mode):
    assert from_cli("--tokenizer-mode", mode).tokenizer_mode == "slow"
    assert EngineArgs(model="m", tokenizer_mode=mode).tokenizer_mode == "slow"


def test_a_tokenizer_given_as_a_string_is_kept():
    assert from_cli("--tokenizer", "elsewhere").tokenizer == "elsewhere"
    assert EngineArgs(model="m", tokenizer=Path("elsewhere")).tokenizer == "elsewhere"


@pytest.mark.parametrize(
    ("backend", "value"), [(Backend.RT, "native"), (Backend.MOCK, "mock"), ("numpy", "numpy")]
)
def test_backend_is_usable_as_a_string_and_as_an_enum(backend, value):
    assert EngineArgs(model="m", backend=backend).backend == value


def test_cache_dir_none_turns_caching_off():
    assert from_cli("--cache-dir", "None").cache_dir is None
    assert EngineArgs(model="m", cache_dir=None).cache_dir is None


def test_a_bare_card_is_a_device():
    assert from_cli("--devices", "npu:0").devices == "npu:0"


def test_help_of_cache_dir_is_about_the_cache():
    help_of = {a.dest: a.help for a in parser()._actions}
    assert "furiosa/llm" in help_of["cache_dir"]
    assert "npu" not in help_of["cache_dir"]
    assert "every card" in help_of["devices"]


@pytest.mark.parametrize("name", ["num_speculative_tokens",
                                  "speculative_model_paged_attention_num_blocks"])  # fmt: skip
def test_a_draft_model_is_refused_not_ignored(name):
    with pytest.raises(InvalidRequestError, match="draft model") as caught:
        EngineArgs(model="m", **{name: 4})
    assert caught.value.param == name


def test_packing_type_is_checked_when_the_arguments_are_made():
    with pytest.raises(InvalidRequestError, match="--packing-type: 'X' is not one of IDENTITY"):
        EngineArgs(model="m", packing_type="X")


REFUSED = [
    pytest.param("model", "", "not a path", id="empty model"),
    pytest.param("tokenizer", "", "not the path", id="empty tokenizer"),
    pytest.param("tokenizer_mode", "fast", "not one of auto, slow", id="tokenizer mode"),
    pytest.param("seed", 2**64, "not an integer from", id="seed"),
    pytest.param("devices", "npu:x", "'npu:x' is not a device", id="devices"),
    pytest.param("data_parallel_size", 0, "at least 1", id="dp"),
    pytest.param("cache_dir", "", "not a directory's path", id="empty cache dir"),
    pytest.param("backend", "furiosa_rt_cuda", "not one of native, numpy, mock", id="backend"),
    pytest.param("paged_attention_num_blocks", 0, "at least 1", id="blocks"),
    pytest.param("npu_queue_limit", 0, "0 is not an integer of at least 1", id="queue limit"),
    pytest.param("max_processing_samples", -1, "at least 1", id="samples"),
    pytest.param("spare_blocks_ratio", 1.0, "of at least 0 and below 1", id="ratio of one"),
    pytest.param("spare_blocks_ratio", 10**400, "is not a number", id="ratio too big for a float"),
    pytest.param("spare_blocks_ratio", -0.1, "of at least 0 and below 1", id="ratio below zero"),
    pytest.param("spare_blocks_ratio", float("nan"), "nan is not a number", id="ratio nan"),
    pytest.param("weights", "fp8", "not one of auto, fp32", id="weights"),
    pytest.param("kv_cache_dtype", "fp8", "not one of auto, fp32, bf16, int8", id="kv dtype"),
    pytest.param("block_size", 0, "from 1 to 1024", id="block size"),
    pytest.param("kv_cache_memory", "0", "not an integer from 1", id="no memory"),
    pytest.param("kv_cache_memory", "2 G", "512MiB or 2GB", id="memory without B"),
    pytest.param("kv_cache_memory", "iB", "512MiB or 2GB", id="memory without number"),
    pytest.param("kv_cache_memory", "9999999TB", "not an integer from 1", id="too much memory"),
    pytest.param("max_model_len", 1, "at least 2", id="max model len"),
    pytest.param("max_num_seqs", MAX_NUM_SEQS + 1, f"from 1 to {MAX_NUM_SEQS}", id="seqs"),
    pytest.param("max_num_batched_tokens", 0, "at least 1", id="batched tokens"),
    pytest.param("tensor_parallel_size", 0, "at least 1", id="tp"),
    pytest.param("num_speculative_tokens", 0, "draft model", id="speculative tokens"),
]


@pytest.mark.parametrize(("name", "value", "reason"), REFUSED)
def test_the_constructor_refuses(name, value, reason):
    with pytest.raises(InvalidRequestError) as caught:
        EngineArgs(**{"model": "m", name: value})
    assert str(caught.value).startswith("--" + name.replace("_", "-") + ": ")
    assert reason in str(caught.value)
    assert caught.value.param == name


@pytest.mark.parametrize(("name", "value", "reason"), REFUSED)
def test_the_command_line_refuses(name, value, reason, capsys):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(SystemExit) as caught:
        from_cli(f"{flag}={value}")
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert reason in error
    assert error.count(flag) == 1, "the flag is named, once"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seed", "x"], "'x' is not an integer"),
        (["--spare-blocks-ratio", "x"], "'x' is not a number"),
        (["--is-offline", "maybe"], "'maybe' is not True or False"),
        (["--seed", "1.0"], "'1.0' is not an integer"),
        (["--block-size", "None"], "'None' is not an integer"),
    ],
)
def test_the_command_line_refuses_text(arguments, reason, capsys):
    with pytest.raises(SystemExit) as caught:
        from_cli(*arguments)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("npu_queue_limit", True), ("npu_queue_limit", 2.0), ("is_offline", "False"),
     ("is_offline", 1), ("use_speculative_decoding_if_possible", None), ("model", None),
     ("model", 3), ("backend", 3), ("cache_dir", 3), ("devices", 0), ("devices", ["npu:0", 1])],
)  # fmt: skip
def test_the_constructor_refuses_another_type(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        EngineArgs(**{"model": "m", name: value})
    assert caught.value.param == name


def test_devices_may_be_a_list_and_it_is_the_arguments_own():
    given = ["npu:0", "npu:1"]
    args = EngineArgs(model="m", devices=given)
    given.append("npu:2")
    assert args.devices == ["npu:0", "npu:1"]
    with pytest.raises(DeviceError):
        EngineArgs(model="m", devices=[])


def test_model_is_required(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args([])
    assert "--model" in capsys.readouterr().err
    with pytest.raises(InvalidRequestError, match="--model"):
        EngineArgs.from_cli_args(argparse.Namespace())


def test_from_cli_args_takes_the_fields_that_are_there():
    namespace = argparse.Namespace(model="m", seed=3, port=8000)
    assert EngineArgs.from_cli_args(namespace) == EngineArgs(model="m", seed=3)
    with pytest.raises(InvalidRequestError, match="--npu-queue-limit"):
        EngineArgs.from_cli_args(argparse.Namespace(model="m", npu_queue_limit=0))


def test_a_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert EngineArgs(model="m", cache_dir="~/c").cache_dir == Path("/home/me/c")


def test_replace_checks_again():
    args = EngineArgs(model="m", kv_cache_memory="1KiB")
    assert dataclasses.replace(args, seed=1).kv_cache_memory == 1024
    with pytest.raises(InvalidRequestError):
        dataclasses.replace(args, block_size=0)


def test_two_sizes_for_one_pool_are_refused():
    with pytest.raises(
        InvalidRequestError, match=r"--kv-cache-memory.*--paged-attention-num-blocks"
    ):
        EngineArgs("m", paged_attention_num_blocks=64, kv_cache_memory="1GiB")
