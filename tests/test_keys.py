"""furiosa-serve keys: it makes what a daemon and its clients need, and what only they can read."""

import stat

import pytest
from daemons import make_home
from tiny_models import tiny_artifact

from furiosa_llm import SamplingParams
from furiosa_llm.client import Client, CurveKeys, DaemonUnreachableError


@pytest.fixture(scope="module")
def home():
    with make_home() as home:
        yield home


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_artifact(tmp_path_factory.mktemp("model")).path)


def files_in(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_the_files_are_their_owners_alone(home, tmp_path):
    keys = tmp_path / "keys"
    shown = home.run("keys", str(keys), "alice", "bob").stdout
    assert files_in(keys) == {
        "daemon.key", "daemon.key_secret", "alice.key_secret", "bob.key_secret",
        "clients/alice.key", "clients/bob.key",
    }  # fmt: skip
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.rglob("*.key*")} == {0o600}
    assert stat.S_IMODE((keys / "clients").stat().st_mode) == 0o700
    assert f"--curve-key-file {keys}/daemon.key_secret --curve-clients-dir {keys}/clients" in shown
    assert f"bob: {keys}/bob.key_secret {keys}/daemon.key" in shown


def test_a_second_run_adds_and_overwrites_nothing(home, tmp_path):
    home.run("keys", str(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.key*")}
    assert (
        "client.key_secret is there already"
        in home.run("keys", str(tmp_path), "new", "client", expect=2).stderr
    )
    assert files_in(tmp_path) == {str(path.relative_to(tmp_path)) for path in before}
    home.run("keys", str(tmp_path), "new")
    assert files_in(tmp_path) >= {"new.key_secret", "clients/new.key"}
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["../up", "", "daemon", "a" * 65, ".hidden"])
def test_names_that_are_none(home, tmp_path, name):
    assert repr(name) in home.run("keys", str(tmp_path), name, expect=2).stderr
    assert not files_in(tmp_path)


def test_a_place_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").write_text("")
    assert "keys cannot be written to" in home.run("keys", str(tmp_path / "file"), expect=2).stderr


@pytest.mark.slow
def test_a_daemon_lets_in_who_has_the_keys_and_nobody_else(home, model, tmp_path):
    keys, others = tmp_path / "keys", tmp_path / "others"
    home.run("keys", str(keys), "alice")
    home.run("keys", str(others), "stranger")
    home.run(
        "start", model, "--socket", "tcp://127.0.0.1:*", "--curve-clients-dir",
        str(keys / "clients"), "--curve-key-file", str(keys / "daemon.key_secret"),
    )  # fmt: skip
    address = home.status()["socket"]
    assert address.startswith("tcp://127.0.0.1:")

    def generate(server_key, key_file, timeout_s=10.0):
        curve = CurveKeys(server_key, key_file)
        with Client(address, curve=curve, connect_timeout_s=timeout_s) as client:
            params = SamplingParams(max_tokens=5, ignore_eos=True)
            return client.generate({"prompt_token_ids": [5, 6]}, params).num_output_tokens

    assert generate(keys / "daemon.key", keys / "alice.key_secret") == 5
    with pytest.raises(DaemonUnreachableError, match="does not know this client's key"):
        generate(keys / "daemon.key", others / "stranger.key_secret")
    with pytest.raises(DaemonUnreachableError, match="or its key is another"):
        generate(others / "daemon.key", keys / "alice.key_secret", timeout_s=0.5)

    # Others come and go while it runs.
    home.run("keys", str(keys), "bob")
    (keys / "clients" / "alice.key").unlink()
    home.run("reload")
    assert generate(keys / "daemon.key", keys / "bob.key_secret") == 5
    with pytest.raises(DaemonUnreachableError, match="does not know this client's key"):
        generate(keys / "daemon.key", keys / "alice.key_secret")

    flags = ["--server-key", f"{keys}/daemon.key", "--key-file", f"{keys}/bob.key_secret"]
    said = home.run_process("generate", "--connect", address, *flags, "--max-tokens", "3", "Hi")
    assert said.returncode == 0, said
    assert said.stdout
    refused = home.run_process(
        "generate", "--connect", address, "--server-key", f"{keys}/daemon.key",
        "--key-file", f"{others}/stranger.key_secret", "Hi",
    )  # fmt: skip
    assert refused.returncode == 1
    assert "does not know this client's key" in refused.stderr
