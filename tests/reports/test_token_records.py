"""Records of tokens are small, whole, and as docs/tokens.md says."""

import random
import re
from pathlib import Path

import pyarrow.parquet
import pytest
from recorded_tokens import HEADER, row, write_records

from opd_lightning.callbacks.token_recorder import estimated_bytes
from opd_lightning.reports.token_records import VALUES, find_records, read_header, read_record, steps_of, write_record

DOCS = Path(__file__).parents[2] / "docs" / "tokens.md"


def test_what_is_written_is_read(tmp_path):
    write_records(tmp_path / "tokens")
    assert find_records(tmp_path) == find_records(tmp_path / "tokens") == tmp_path / "tokens"
    assert list(steps_of(tmp_path / "tokens")) == [0, 10]
    rows = read_record(tmp_path / "tokens" / "step=000010.parquet")
    assert len(rows) == 5 and rows[0]["texts"][:3] == ["so ", "the", " sum"] and rows[0]["token_weight"] is None
    assert read_header(tmp_path) == HEADER | {"format": "opd_lightning tokens 1"}


@pytest.mark.parametrize(("num_tokens", "top_k", "num_prompt_tokens"), [(2000, 8, 0), (100, 1, 4000), (100, 32, 0)])
def test_a_record_takes_about_as_many_bytes_as_stated(tmp_path, num_tokens, top_k, num_prompt_tokens):
    """Numbers that cannot be compressed, and words of a vocabulary of 50,000."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(50_000)]
    ids = [rng.randrange(50_000) for _ in range(num_tokens)]
    many = row(0, 0, [words[i] for i in ids]) | {"token_ids": ids}
    many |= {name: [rng.random() for _ in ids] for name in VALUES}
    for who in ("student", "teacher"):
        listed = [[rng.randrange(50_000) if rng.random() < 0.2 else i % 3000 for _ in range(top_k)] for i in ids]
        many[f"{who}_top_ids"] = listed
        many[f"{who}_top_texts"] = [[words[i] for i in each] for each in listed]
        many[f"{who}_top_log_probs"] = [[-rng.random() for _ in each] for each in listed]
    asked = [rng.randrange(50_000) for _ in range(num_prompt_tokens)]
    text = "".join(words[i] for i in asked)
    many |= {"prompt_ids": asked, "student_prompt": text, "teacher_prompt": f"[INST] {text}"}
    said = estimated_bytes(num_tokens, top_k, num_prompt_tokens)
    assert 0.8 * said < write_record(tmp_path, 0, [many], {}) < 1.02 * said


def test_the_page_names_every_column(tmp_path):
    write_records(tmp_path)
    columns = pyarrow.parquet.read_schema(tmp_path / "step=000000.parquet").names
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index("## The files") :]
    named = {
        name
        for line in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
        for name in re.findall("`(\\w+)`", line)
    }
    assert named == set(columns)


def test_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    write_records(tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(code, str(DOCS), "exec"), {})
    assert "reverse_kl" in capsys.readouterr().out


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"records: .* holds no records of tokens .* Add the callback TokenRecorder"):
        find_records(tmp_path)
    (tmp_path / "step=000001.parquet").write_bytes(b"nothing")
    for read in (read_header, lambda folder: read_record(folder / "step=000001.parquet")):
        with pytest.raises(ValueError, match=r"step=000001.parquet' cannot be read .* Remove it, or copy it again"):
            read(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "step=000001.parquet")
    with pytest.raises(ValueError, match=r"is no record of tokens \(expected 'opd_lightning tokens 1'"):
        read_header(tmp_path)
