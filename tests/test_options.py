"""Options: where a value comes from, what is refused, and that one table serves all."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from furiosa_llm.args import ENGINE_FIELDS
from furiosa_llm.cli.main import main
from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.option_layers import Origin, resolve_layers
from furiosa_llm.server.option_readers import (
    read_bool,
    read_bytes,
    read_count,
    read_list,
    read_seconds,
)
from furiosa_llm.server.options import GROUPS, OPTIONS, DaemonConfig


def layers(flags=None, *, config=None, env=None):
    return resolve_layers(flags or {}, config=config, env=env or {})


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (read_count, "4096", 4096),
        (read_count, "1k", 1000),
        (read_count, "1K", 1000),
        (read_count, "25.6k", 25_600),
        (read_count, "8Ki", 8192),
        (read_count, "1.5M", 1_500_000),
        (read_count, " 7 ", 7),
        (read_bytes, "1048576", 1 << 20),
        (read_bytes, "2GiB", 2 << 30),
        (read_bytes, "2GB", 2 * 10**9),
        (read_bytes, "500kB", 500_000),
        (read_bytes, "64Ki", 1 << 16),
        (read_bytes, "10b", 10),
        (read_seconds, "30", 30.0),
        (read_seconds, "1.5s", 1.5),
        (read_seconds, "500ms", 0.5),
        (read_seconds, "2m", 120.0),
        (read_seconds, "1 h", 3600.0),
        (read_bool, "On", True),
        (read_bool, "no", False),
        (read_list, "a, b,,c", ("a", "b", "c")),
    ],
)
def test_reading(read, text, value):
    assert read("--x", text) == value


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_count, text)
        for text in ("", "k", "-1", "1.5", "1.2345k", "1kB", "1e3", "1 000", "٣", "9" * 30)
    ]
    + [(read_bytes, text) for text in ("", "1.5", "-1", "1KiBi", "0x10", "1 PiB")]
    + [(read_seconds, text) for text in ("", "-1", "1d", "inf", "nan", "1e9")]
    + [(read_bool, text) for text in ("", "maybe", "2")],
)
def test_what_cannot_be_read_is_refused_by_name(read, text):
    with pytest.raises(InvalidRequestError, match=r"^--x: "):
        read("--x", text)


# --- precedence ----------------------------------------------------------------------------------


def test_default_then_file_then_environment_then_flag(write):
    config = write("c.toml", 'port = 1\nhost = "file"\nmax-queue = 3\nmodel = "m"\n')
    env = {"FURIOSA_SERVE_PORT": "2", "FURIOSA_SERVE_HOST": "environment"}
    found = layers({"port": "4"}, config=config, env=env)
    keys = ("port", "host", "max-queue", "drain-timeout")
    assert [found.values[key] for key in keys] == [4, "environment", 3, 30.0]
    assert [found.origins[key] for key in keys] == [
        Origin("flag", "--port"),
        Origin("environment", "FURIOSA_SERVE_HOST"),
        Origin("file", config),
        Origin("default", ""),
    ]
    options = found.options()
    assert (options.http.port, options.http.host, options.limits.max_queue) == (
        4, "environment", 3,
    )  # fmt: skip
    assert options.engine.model == "m"


def test_an_empty_variable_is_an_unset_one():
    assert layers(env={"FURIOSA_SERVE_PORT": ""}).origins["port"].kind == "default"


def test_the_file_may_be_named_by_a_variable(write):
    config = write("c.yaml", "max_queue: 2k\n")
    found = layers(env={"FURIOSA_SERVE_CONFIG": config})
    assert (found.values["max-queue"], found.origins["max-queue"].where) == (2000, config)
    other = write("d.yaml", "max_queue: 5\n")  # a flag goes before a variable
    assert layers(config=other, env={"FURIOSA_SERVE_CONFIG": config}).values["max-queue"] == 5


@pytest.mark.parametrize("key", OPTIONS)
def test_every_default_is_what_its_own_check_lets_through(key):
    option = OPTIONS[key]
    if key != "model":
        assert option.check(option.flag, option.default) == option.default


def test_the_defaults_are_those_of_the_parts():
    options = layers({"model": "m"}).options()
    assert options.daemon == DaemonConfig()
    assert options.http == HttpConfig()


def test_every_engine_argument_is_an_option_under_its_own_name():
    keys = {name.replace("_", "-") for name in ENGINE_FIELDS}
    assert keys == {option.key for option in OPTIONS.values() if option.owner == "engine"}
    options = layers({"model": "m", "max-num-seqs": "1k", "kv-cache-memory": "1GiB"}).options()
    assert (options.engine.max_num_seqs, options.engine.kv_cache_memory) == (1000, 1 << 30)
    assert layers({"seed": "-3"}).values["seed"] == -3


def test_every_field_of_http_and_daemon_is_an_option():
    """A field that nobody can set is dead; `reuse_port` follows from --api-servers."""
    for owner, part in (("http", HttpConfig), ("daemon", DaemonConfig)):
        fields = {each.name for each in dataclasses.fields(part)} - {"reuse_port"}
        assert fields == {option.field for option in OPTIONS.values() if option.owner == owner}


def test_none_unsets():
    found = layers({"cache-dir": "None", "model": "m"}, env={"FURIOSA_SERVE_UDS": "none"})
    assert found.values["cache-dir"] is None
    assert found.values["uds"] is None
    with pytest.raises(InvalidRequestError, match="--port: 'none' is not a whole number"):
        layers({"port": "none"})


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", 'devices = ["npu:0:0", "npu:1:0"]\nserved-model-name = "a,b"\n'
                   'is_offline = true\nbody-timeout = 5\nmax-body = "1MiB"\nmodel = "m"\n'),
        ("c.yaml", "devices: [npu:0:0, npu:1:0]\nserved-model-name: [a, b]\nis_offline: true\n"
                   "body-timeout: 5s\nmax-body: 1048576\nmodel: m\ncache-dir: null\n"),
    ],
)  # fmt: skip
def test_toml_and_yaml(write, name, text):
    options = layers(config=write(name, text)).options()
    assert options.engine.devices == ["npu:0:0", "npu:1:0"]
    assert options.engine.is_offline is True
    assert options.daemon.served_model_name == ("a", "b")
    assert options.http.body_timeout_s == 5.0
    assert options.limits.max_body_bytes == 1 << 20


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("c.toml", "max-que = 1", "c.toml: max-que: there is no such option: did you mean max-que"),
        ("c.toml", "zzzzz = 1", "there is no such option: 'furiosa-serve help'"),
        ("c.toml", "max-queue = 1\nmax_queue = 2", "it is there twice"),
        ("c.toml", "port = 1\nport = 2", "not valid TOML"),
        ("c.yaml", "port: 1\nport: 2", "not valid YAML"),
        ("c.yaml", "- port", "holds no list of"),
        ("c.yaml", "a: &a [*a]", "not valid YAML|no such option"),
        ("c.yaml", "port: !!python/object:os.system x", "not valid YAML"),
        ("c.yaml", "port: '80k'", "c.yaml: port: 80000 is not an integer from 0 to 65535"),
        ("c.toml", "port = true", "c.toml: port: True is not an integer"),
        ("c.toml", "port = 1.5", "c.toml: port: 1.5 is not an integer"),
        ("c.toml", "[http]\nport = 1", "c.toml: http: there is no such option"),
        ("c.toml", "host = [1]", "c.toml: host: "),
        ("c.toml", "devices = 7", "c.toml: devices: "),
        ("c.toml", 'devices = "npu:x"', "c.toml: devices: "),
        ("c.toml", 'is-offline = "perhaps"', "c.toml: is-offline: 'perhaps' is not true"),
        ("c.ini", "port = 1", "not a .toml, .yaml or .yml file"),
        ("c.toml", "\x00", "not valid TOML"),
        ("c.yaml", "[" * 10_000, "not valid YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(write, name, text, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        layers(config=write(name, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InvalidRequestError, match="cannot be read: No such file"):
        layers(config=str(tmp_path / "c.toml"))
    with pytest.raises(InvalidRequestError, match="cannot be read: Is a directory"):
        layers(config=str(tmp_path))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({}, "MODEL: there is none"),
        ({"model": "m", "ssl-keyfile": "k"}, "no --ssl-certfile"),
        ({"model": "m", "socket": "tcp://*:1"}, "--socket: tcp://\\*:1 is open to whoever"),
        (
            {"model": "m", "api-servers": "2", "uds": "/x"},
            "--api-servers: 2 processes cannot share",
        ),
        ({"model": "m", "kv-cache-memory": "1GB", "paged-attention-num-blocks": "4"}, "give one"),
    ],
)
def test_values_that_do_not_go_together(flags, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        layers(flags).options()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("port", "65536"), ("port", "-1"), ("port", "http"), ("name", "a/b"), ("host", " "),
        ("socket", "udp://x"), ("socket", "ipc://"), ("log-level", "loud"), ("max-body", "1"),
        ("drain-timeout", "-1"), ("header-timeout", "0"), ("api-servers", "0"),
        ("backend", "tpu"), ("devices", "npu:"), ("block-size", "0"), ("max-queue", "1.5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_a_value_out_of_bounds_is_refused_by_the_name_it_was_given_under(key, text, source):
    option = OPTIONS[key]
    name = option.flag if source == "flag" else option.variable
    given = {"flags": {key: text}} if source == "flag" else {"env": {option.variable: text}}
    with pytest.raises(InvalidRequestError, match=re.escape(name) + ": "):
        layers(**given)


def test_variables_that_only_look_like_options_are_warned_of():
    env = {"FURIOSA_SERVE_PROT": "1", "FURIOSA_SERVE_TOPOLOGY": "1x1", "FURIOSA_SERVE_API_KEY": "k"}
    assert layers(env=env).warnings == [
        "FURIOSA_SERVE_PROT is set, but is no option's variable: did you mean FURIOSA_SERVE_PORT?"
    ]


# --- the command line ----------------------------------------------------------------------------


def run(*arguments, exit_code=0, **env):
    result = CliRunner(env=env).invoke(main, arguments)
    assert result.exit_code == exit_code, result.stderr
    return result


def test_config_show(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("max-queue = 7\n")
    arguments = ["config", "show", "--port", "9k", "--is-offline", "--config", str(config)]
    result = run(*arguments, "--changed", FURIOSA_SERVE_HOST="::1")
    assert [line.split(maxsplit=2) for line in result.stdout.splitlines()] == [
        ["host", "::1", "environment FURIOSA_SERVE_HOST"],
        ["port", "9000", "flag --port"],
        ["max-queue", "7", f"file {config}"],
        ["is-offline", "true", "flag --is-offline"],
    ]
    assert len(run(*arguments).stdout.splitlines()) == len(OPTIONS)


def test_config_show_as_json():
    rows = json.loads(run("config", "show", "the-model", "--json").stdout)
    assert set(rows) == set(OPTIONS)
    assert rows["model"] == {
        "value": "the-model",
        "from": "flag",
        "where": "--model",
        "flag": "--model",
        "variable": "FURIOSA_SERVE_MODEL",
    }
    assert rows["port"]["value"] == 8000
    assert Path(rows["cache-dir"]["value"]).is_absolute()


def test_config_show_says_what_does_not_go_together():
    result = run("config", "show", "m", "--ssl-keyfile", "k", "--changed", exit_code=2)
    assert "flag --ssl-keyfile" in result.stdout
    assert result.stderr == (
        "error: --ssl-keyfile: there is a key but no --ssl-certfile: give both\n"
    )
    result = run("config", "show", "--port", "x", exit_code=2)
    assert result.stderr.startswith("error: --port: 'x' is not a whole number")


def test_two_models_are_refused():
    assert "MODEL is 'a' but --model is 'b'" in run(
        "config", "show", "a", "--model", "b", exit_code=2
    ).stderr  # fmt: skip


@pytest.mark.parametrize("command", ["serve", "start"])
def test_help_shows_every_option_in_its_group(command):
    text = run(command, "--help").stdout
    for group in GROUPS:
        assert f"\n{group}:\n" in text
    for option in OPTIONS.values():
        assert f"  {option.flag} {option.metavar}" in text
    assert "--report-fd" not in text


def test_help_searches():
    assert "FURIOSA_SERVE_MAX_QUEUE" in run("help", "queue").stdout
    assert "FURIOSA_SERVE_DRAIN_TIMEOUT" in run("help", "FURIOSA_SERVE_DRAIN").stdout
    assert "furiosa-serve restart" in run("help", "again").stdout
    everything = run("help").stdout
    assert all(option.flag in everything for option in OPTIONS.values())
    assert "did you mean max-queue?" in run("help", "max-quee", exit_code=1).stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    assert "_FURIOSA_SERVE_COMPLETE" in run("completion", shell).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("furiosa-serve re", {"restart", "reload"}),
        ("furiosa-serve serve --max-q", {"--max-queue"}),
        ("furiosa-serve serve --log-format j", {"json"}),
    ],
)
def test_completing(words, expected):
    env = {
        "_FURIOSA_SERVE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    result = CliRunner(env=env).invoke(main, [], prog_name="furiosa-serve")
    found = {line.partition(",")[2] for line in result.stdout.splitlines()}
    assert expected <= found
    assert len(found) < 5


def test_an_unknown_flag_names_the_nearest():
    result = run("serve", "m", "--max-que", "1", exit_code=2)
    assert "--max-queue" in result.stderr
