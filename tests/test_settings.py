"""From arguments to settings: what is filled in, what is refused, and what is left behind."""

import tempfile

import pytest
from tiny_models import make_checkpoint, tiny_artifact

from furiosa_llm import EngineArgs
from furiosa_llm.engine import settings as settings_module
from furiosa_llm.engine.settings import resolve_settings
from furiosa_llm.errors import InvalidRequestError

GIB = 2**30


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setenv("FURIOSA_SERVE_TOPOLOGY", "4x2")
    monkeypatch.setattr(settings_module, "available_memory_bytes", lambda: 1 * GIB)


def resolve(artifact, **changed):
    defaults = {"backend": "numpy", "devices": "npu:0:*"}
    return resolve_settings(EngineArgs(model=str(artifact.path), **(defaults | changed)))


def configure(artifact, **changed):
    return resolve(artifact, **changed).workers[0]


def block_bytes(artifact, *, dtype="fp32", block_size=16):
    return artifact.config.kv_bytes_per_token(dtype) * block_size


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param(
            {},
            {
                "backend": "numpy", "kv_cache_dtype": "fp32", "block_size": 16,
                "max_num_seqs": 256, "max_num_batched_tokens": 2048, "npu_queue_limit": 2,
                "max_processing_samples": 65536, "spare_blocks_ratio": 0.2, "is_offline": False,
                "packing_type": "IDENTITY",
            },
            id="defaults",
        ),
        pytest.param(
            {"is_offline": True},
            {"is_offline": True, "spare_blocks_ratio": 0.0, "max_num_batched_tokens": 8192},
            id="offline",
        ),
        pytest.param(
            {
                "npu_queue_limit": 8, "max_processing_samples": 64, "spare_blocks_ratio": 0.5,
                "max_num_seqs": 3, "max_num_batched_tokens": 77, "packing_type": "GREEDY",
                "max_model_len": 99, "paged_attention_num_blocks": 50, "block_size": 8,
                "kv_cache_dtype": "bf16",
            },
            {
                "npu_queue_limit": 8, "max_processing_samples": 64, "spare_blocks_ratio": 0.5,
                "max_num_seqs": 3, "max_num_batched_tokens": 77, "packing_type": "GREEDY",
                "max_model_len": 99, "num_blocks": 50, "block_size": 8, "kv_cache_dtype": "bf16",
            },
            id="as given",
        ),
    ],
)  # fmt: skip
def test_what_a_worker_is_told(artifact, changed, expected):
    told = configure(artifact, **changed)
    assert {name: getattr(told, name) for name in expected} == expected


def test_each_device_is_a_worker(artifact):
    workers = resolve(artifact, devices="npu:0:*,npu:2:0").workers
    assert [(w.worker_id, w.epoch, len(w.cpus)) for w in workers] == [(0, 1, 2), (1, 1, 1)]


def test_kv_pool_is_what_the_greatest_load_fills(artifact):
    told = configure(artifact, max_num_seqs=3, max_model_len=33)
    assert told.num_blocks == 3 * 3


def test_kv_pool_is_at_most_a_share_of_the_memory(artifact, monkeypatch):
    available = 100 * block_bytes(artifact)
    monkeypatch.setattr(settings_module, "available_memory_bytes", lambda: available)
    assert configure(artifact).num_blocks == 40
    two = resolve(artifact, devices="npu:0:*,npu:1:*").workers
    assert [worker.num_blocks for worker in two] == [20, 20]


def test_kv_cache_memory_is_cut_into_blocks(artifact):
    size = 17 * block_bytes(artifact) + 5
    assert configure(artifact, kv_cache_memory=size).num_blocks == 17


def test_a_context_that_the_pool_does_not_hold_is_cut(artifact, caplog):
    told = configure(artifact, paged_attention_num_blocks=4)
    assert told.max_model_len == 64
    assert "holds 64 tokens" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"max_model_len": 10**6}, "--max-model-len: 1000000 is not", id="too long"),
        pytest.param({"max_model_len": 1}, "--max-model-len: 1 is not", id="too short"),
        pytest.param(
            {"max_model_len": 65, "paged_attention_num_blocks": 4},
            r"65 tokens need 5 KV blocks of 16 tokens but a worker has 4: lower it to 64",
            id="longer than the pool",
        ),
        pytest.param(
            {"paged_attention_num_blocks": 1, "block_size": 1}, "need at least 2", id="tiny pool"
        ),
        pytest.param({"kv_cache_memory": 10}, "hold no block", id="no block"),
        pytest.param(
            {"kv_cache_memory": 2 * GIB},
            rf"--kv-cache-memory: .* but {GIB} bytes of memory are available: give at most",
            id="more than there is",
        ),
        pytest.param(
            {"paged_attention_num_blocks": 10**8},
            "--paged-attention-num-blocks: 100000000 blocks",
            id="more blocks than there is memory",
        ),
    ],
)
def test_refused(artifact, changed, message):
    with pytest.raises(InvalidRequestError, match=message):
        resolve(artifact, **changed)


def test_a_refusal_leaves_no_temporary_artifact(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    args = EngineArgs(model=str(checkpoint), cache_dir=None, devices="cpu", max_model_len=10**6)
    with pytest.raises(InvalidRequestError, match="--max-model-len"):
        resolve_settings(args)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_build_shows_its_progress_where_nobody_asked_for_it(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    args = EngineArgs(str(checkpoint), cache_dir=tmp_path / "cache", backend="mock")
    resolve_settings(args)
    assert "packing: 100 %" in capsys.readouterr().err
    resolve_settings(args)  # found in the cache: nothing to show
    assert capsys.readouterr().err == ""
