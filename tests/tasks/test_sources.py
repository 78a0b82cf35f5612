import csv
import io
import json
import math

import pytest

from opd_lightning.interfaces.columns import MISSING, look_up, matches
from opd_lightning.tasks.sources import DataSource, load_problems

ROWS = [
    {"question": "1+1?", "answer": "2", "level": 1, "language": "en"},
    {"question": "What is\n2+2, “exactly”?", "answer": "4", "level": 2, "language": "de"},
    {"question": "3+3?", "answer": "6", "level": 1, "language": "de"},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def not_utf8():
    """A parquet file whose text is none."""
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"\xb6", b"1+1?"], pyarrow.binary()).view(pyarrow.string())
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"question": texts, "answer": ["1", "2"]}), file)
    return file.getvalue()


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


@pytest.fixture
def data(tmp_path):
    """Write rows to a file with the given ending and return its path as text."""

    def write(rows, ending=".jsonl"):
        path = tmp_path / f"sums{ending}"
        WRITERS[ending](path, rows)
        return str(path)

    return write


@pytest.fixture
def raw(tmp_path):
    def write(content, name="sums.jsonl"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_problems(data, ending):
    problems = load_problems(DataSource(data(ROWS, ending)), "train")
    assert [problem.uid for problem in problems] == ["sums/train/0", "sums/train/1", "sums/train/2"]
    assert [problem.messages for problem in problems] == [({"role": "user", "content": r["question"]},) for r in ROWS]
    assert [problem.answer for problem in problems] == ["2", "4", "6"]
    assert {problem.source for problem in problems} == {"sums"}
    assert [{k: str(v) for k, v in problem.columns.items()} for problem in problems] == [
        {"level": str(row["level"]), "language": row["language"]} for row in ROWS
    ]


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"where": {"level": 1}}, [0, 2]),
        ({"where": {"level": [1, 2], "language": "de"}}, [1, 2]),
        ({"max_prompt_characters": 5}, [0, 2]),
        ({"limit": 2}, [0, 1]),
        ({"where": {"level": 1}, "limit": 1}, [0]),
    ],
)
def test_filters_keep_rows_under_their_own_number(data, ending, settings, kept):
    problems = load_problems(DataSource(data(ROWS, ending), name="s", **settings), "test")
    assert [problem.uid for problem in problems] == [f"s/test/{index}" for index in kept]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_verl_columns(data, ending):
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    rows = [{"prompt": messages, "reward_model": {"ground_truth": "2", "style": "rule"}, "extra_info": {"level": 3}}]
    source = DataSource(
        data(rows, ending), question="prompt", answer="reward_model.ground_truth", where={"extra_info.level": 3}
    )
    (problem,) = load_problems(source, "train")
    assert list(problem.messages) == messages
    assert problem.answer == "2"
    assert problem.columns["extra_info"] == {"level": 3}


def test_other_column_names_and_number_answers(data):
    rows = [{"problem": "1+1?", "solution": 2}, {"problem": "1/2?", "solution": 0.5}]
    problems = load_problems(DataSource(data(rows), question="problem", answer="solution"), "train")
    assert [problem.answer for problem in problems] == ["2", "0.5"]


def test_blank_lines_and_byte_order_mark_are_tolerated(raw):
    path = raw(b'\xef\xbb\xbf{"question": "a\xe2\x80\xa8b", "answer": "1"}\r\n\n  \n{"question": "b", "answer": "2"}')
    problems = load_problems(DataSource(path), "train")
    assert [problem.answer for problem in problems] == ["1", "2"]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("data/gsm8k/train.jsonl", "gsm8k"),
        ("data/hard.csv", "hard"),
        ("openai/gsm8k", "gsm8k"),
        ("./folder/amc23", "amc23"),
    ],
)
def test_default_names(path, label):
    assert DataSource(path).label == label


def test_local_folder_in_hub_format(data, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub_format"
    (folder / "data").mkdir(parents=True)
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", ROWS)
    problems = load_problems(DataSource(str(folder)), "train")
    assert [problem.uid for problem in problems] == [f"hub_format/train/{index}" for index in range(3)]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    assert len(load_problems(DataSource(str(folder), split="test"), "test")) == 1
    with pytest.raises(ValueError, match=r"hub_format has the splits train, test\. Choose one with source\.split"):
        load_problems(DataSource(str(folder)), "train")
    with pytest.raises(ValueError, match=r"(?s)hub_format: .*could be loaded.*nowhere"):
        load_problems(DataSource(str(folder), split="nowhere"), "train")


def test_unknown_hub_name_is_one_clear_error(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("it is not on the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"some/thing: no such file, and no data set could be loaded.*not on the hub"):
        load_problems(DataSource("some/thing"), "train")


GOOD_LINE = '{"question": "1+1?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sums.jsonl", "", r"sums\.jsonl is empty: expected at least one row"),
        ("sums.json", "[]", r"sums\.json is empty"),
        ("sums.csv", "question,answer\n", r"sums\.csv is empty"),
        ("sums.txt", "1+1?", r"sums\.txt: expected a file ending in \.jsonl, \.json, \.parquet, \.csv, got '\.txt'"),
        ("sums", "1+1?", r"sums: expected a file ending in .*, got 'no ending'"),
        (
            "sums.jsonl",
            GOOD_LINE + '{"question": "1',
            r"sums\.jsonl, line 2: expected one JSON object, but .* character 14",
        ),
        (
            "sums.jsonl",
            GOOD_LINE + "[1]",
            r"sums\.jsonl, line 2: expected an object with named columns, got \[1\] \(list\)",
        ),
        (
            "sums.jsonl",
            GOOD_LINE.encode() * 2 + b'"\xe9"',
            r"sums\.jsonl, line 3: expected UTF-8 text, found byte 0xe9",
        ),
        ("sums.csv", b"question,answer\n\xff,2", r"sums\.csv, line 2: expected UTF-8 text, found byte 0xff"),
        ("sums.csv", "question,answer\n1+1?,2\n1+1?\n", r"sums\.csv, line 3: expected 2 cells"),
        ("sums.csv", "question,answer\n1+1?,2,3\n", r"sums\.csv, line 2: expected 2 cells"),
        ("sums.csv", 'question,answer\n"1+1?,2\n', r"sums\.csv, after line 1: expected valid CSV"),
        ("sums.csv", "question,answer,question\na,1,b\n", "sums.csv, line 1: several columns are called 'question'"),
        ("sums.json", GOOD_LINE * 2, r"sums\.json, line 2: expected valid JSON, .* file ending in \.jsonl"),
        ("sums.json", GOOD_LINE, r"sums\.json: expected a list of objects, got .*\(dict\)"),
        ("sums.json", "[1]", r"sums\.json, row 1: expected an object with named columns"),
        ("sums.parquet", "PAR1", r"sums\.parquet: expected a parquet file, but"),
        ("sums.parquet", not_utf8(), r"sums\.parquet: expected a parquet file, but .* can't decode byte 0xb6"),
        (
            "sums.jsonl",
            GOOD_LINE + "9" * 5000,
            r"line 2: expected one JSON object, but a number has thousands of digits",
        ),
        ("sums.json", f"[{'9' * 5000}]", r"sums\.json: expected valid JSON, but a number has thousands of digits"),
        ("sums.json", "[" * 100_000, r"sums\.json: expected valid JSON, but it is nested too deeply"),
        (
            "sums.jsonl",
            '{"problem": "1", "answer": "2"}',
            r"line 1: there is no column 'question'; available: problem, answer",
        ),
        (
            "sums.jsonl",
            '{"question": "1"}',
            r"line 1: there is no column 'answer'; available: question\. .*with `answer`, beside the path",
        ),
        (
            "sums.jsonl",
            '{"question": 1, "answer": "2"}',
            r"line 1, column 'question': expected text or .*, got 1 \(int\)",
        ),
        ("sums.jsonl", '{"question": null, "answer": "2"}', r"column 'question': expected text or .*, got None"),
        ("sums.jsonl", '{"question": " ", "answer": "2"}', r"line 1, column 'question': the question is empty"),
        ("sums.jsonl", '{"question": [], "answer": "2"}', r"expected chat messages ending with the user's, got \[\]"),
        (
            "sums.jsonl",
            '{"question": ["a"], "answer": "2"}',
            r"expected chat messages with a role and a text content, got 'a'",
        ),
        (
            "sums.jsonl",
            '{"question": [{"role": "assistant", "content": "a"}], "answer": "2"}',
            r"expected chat messages ending with the user's",
        ),
        (
            "sums.jsonl",
            GOOD_LINE + '{"question": "1", "answer": ""}',
            r"line 2, column 'answer': the reference answer is empty",
        ),
        ("sums.jsonl", '{"question": "1", "answer": null}', r"the reference answer is empty"),
        ("sums.jsonl", '{"question": "1", "answer": NaN}', r"the reference answer is empty"),
        (
            "sums.jsonl",
            '{"question": "1", "answer": {"value": "2"}}',
            r"line 1, column 'answer': expected text, a number or a list .*, got {.*} \(dict\)\. Dots step into it,"
            r" such as source\.answer: answer\.value\.",
        ),
        (
            "sums.jsonl",
            '{"question": "1", "answer": [["2"]]}',
            r"expected text, a number or a list of those .*got \[\['2",
        ),
        ("sums.jsonl", '{"question": "1", "answer": []}', r"expected text, a number or a list of those .*got \[\]"),
        ("sums.jsonl", '{"question": "1", "answer": ["2", null]}', r"the reference answer is empty"),
        ("sums.jsonl", '{"question": "1", "answer": true}', r"expected text, a number or a list .*, got True"),
    ],
)
def test_bad_files(raw, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_problems(DataSource(raw(content, name), strict=True), "train")


BAD_ROWS = [
    {"question": "1+1?", "answer": ""},
    {"question": "1+1?", "answer": {"value": "2"}},
    {"question": None, "answer": "2"},
    {"answer": "2"},
]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_does_not_cost_the_file(data, row):
    with pytest.warns(
        UserWarning, match=r"1 of 4 rows cannot be used and are left out \(line 2.*strict: true"
    ) as warned:
        problems = load_problems(DataSource(data([ROWS[0], row, *ROWS[1:]])), "train")
    assert [problem.uid for problem in problems] == ["sums/train/0", "sums/train/2", "sums/train/3"]
    assert len(warned) == 1


def test_bad_rows_are_counted_with_three_examples(data):
    rows = [*ROWS, *BAD_ROWS]
    with pytest.warns(UserWarning, match="4 of 7 rows") as warned:
        assert len(load_problems(DataSource(data(rows)), "train")) == 3
    text = str(warned[0].message)
    assert [f"line {line}" in text for line in (4, 5, 6, 7)] == [True, True, True, False]
    assert "; ...)" in text


def test_rows_that_are_not_even_rows_are_left_out_too(raw):
    lines = [GOOD_LINE, "[1]\n", '{"question": "1\n', GOOD_LINE]
    with pytest.warns(UserWarning, match=r"2 of 4 rows .*line 2: expected an object.*line 3: expected one JSON object"):
        problems = load_problems(DataSource(raw("".join(lines))), "train")
    assert [problem.uid for problem in problems] == ["sums/train/0", "sums/train/3"]
    with pytest.warns(UserWarning, match=r"1 of 2 rows .*line 3: expected 2 cells"):
        assert len(load_problems(DataSource(raw("question,answer\n1,1\n2\n", "sums.csv")), "train")) == 1


def test_a_cell_may_be_long(raw):
    limit = csv.field_size_limit()
    (problem,) = load_problems(DataSource(raw(f"question,answer\n{'x' * 2 * limit},1\n", "sums.csv")), "train")
    assert len(problem.messages[0]["content"]) == 2 * limit and csv.field_size_limit() == limit


def test_a_file_of_bad_rows_is_refused(data):
    with pytest.raises(ValueError, match=r"none of its 4 rows can be used\. The first of 4 faults: line 1, column"):
        load_problems(DataSource(data(BAD_ROWS)), "train")


def test_the_remedies_of_a_strict_file_exist(data):
    path = data([*ROWS, BAD_ROWS[0]])
    with pytest.raises(ValueError, match=r"line 4, column 'answer': the reference answer is empty\. Mend the row, "):
        load_problems(DataSource(path, strict=True), "train")
    source = DataSource(path, strict=True, where={"answer": {"empty": False}})
    assert len(load_problems(source, "train")) == 3


@pytest.mark.parametrize(("answer", "read"), [(["2"], "2"), (["2", 3.5], "2, 3.5"), (7, "7")])
def test_list_answers(data, answer, read):
    (problem,) = load_problems(DataSource(data([{"question": "?", "answer": answer}])), "train")
    assert problem.answer == read


def test_one_of_several_answers_is_named_by_its_place(data):
    path = data([{"question": "?", "answers": ["4", "four"]}])
    (problem,) = load_problems(DataSource(path, answer="answers.0"), "train")
    assert problem.answer == "4"


def test_questions_are_joined_from_columns(data):
    rows = [{"Body": "Tom has 3 {red} pens.", "meta": {"Question": "How many?"}, "n": 2, "answer": "3"}]
    source = DataSource(data(rows), question="{{{n}}} {Body} {meta.Question}\nAnswer:")
    (problem,) = load_problems(source, "train")
    assert problem.messages[0]["content"] == "{2} Tom has 3 {red} pens. How many?\nAnswer:"
    assert set(problem.columns) == {"Body", "meta", "n"}
    with pytest.raises(ValueError, match=r"there is no column 'Boddy'; available: Body, .*with `question`"):
        load_problems(DataSource(data(rows), question="{Boddy} {n}"), "train")
    with pytest.raises(ValueError, match=r"column 'meta': expected text or a number, got {'Question'"):
        load_problems(DataSource(data(rows), question="{Body} {meta}"), "train")


def test_raw_questions_are_the_prompt(data):
    rows = [{"question": " Q: 1+1?\nA: ", "answer": "2"}]
    (problem,) = load_problems(DataSource(data(rows), raw=True), "train")
    assert problem.messages == ({"role": "raw", "content": " Q: 1+1?\nA: "},)
    rows = [{"question": [{"role": "user", "content": "1+1?"}], "answer": "2"}]
    with pytest.raises(ValueError, match=r"expected text, since source\.raw is on, got \[\{"):
        load_problems(DataSource(data(rows), raw=True), "train")


def test_sources_without_answers(data):
    path = data([{"question": "a", "answer": {"any": 1}}, {"question": "b"}])
    for source, read_answer in ((DataSource(path), None), (DataSource(path, answer=None), str.strip)):
        problems = load_problems(source, "train", read_answer)
        assert [problem.answer for problem in problems] == [None, None]
        assert problems[0].columns == {"answer": {"any": 1}}


def test_missing_file_names_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"data/train\.jsonl does not exist\. Relative paths start from {tmp_path}"):
        load_problems(DataSource("data/train.jsonl"), "train")
    with pytest.raises(ValueError, match=r"neither a file, a folder nor the name of a hub data set"):
        load_problems(DataSource("/data/train/all of it"), "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": {"level": 9}}, r"leave none of the 3 rows; column 'level' holds 1 \(int\), 2 \(int\)\."),
        ({"where": {"levle": 1}}, r"no column 'levle' \(available: question, answer, level, language\)"),
        ({"max_prompt_characters": 2}, r"leave none of the 3 rows; max_prompt_characters is 2"),
    ],
)
def test_filters_that_leave_nothing(data, settings, message):
    with pytest.raises(ValueError, match=message):
        load_problems(DataSource(data(ROWS), **settings), "train")


def test_rows_that_filters_leave_out_may_be_broken(data):
    rows = [*ROWS, {"question": None, "answer": "", "level": 3}]
    assert len(load_problems(DataSource(data(rows), where={"level": [1, 2]}), "train")) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "a.jsonl", "limit": 0}, r"source\.limit: expected an integer of at least 1, got 0"),
        ({"path": "a.jsonl", "max_prompt_characters": -1}, r"source\.max_prompt_characters: expected .* got -1"),
        (
            {"path": "a.jsonl", "split": "train"},
            r"source\.split and source\.config belong to hub data sets.*use `where`",
        ),
        ({"path": "a.jsonl", "question": "{a"}, r"source\.question: '\{a' has braces that do not fit"),
        (
            {"path": "a.jsonl", "question": "{}"},
            r"source\.question: expected names of columns in braces, .* got '\{\}'",
        ),
        ({"path": "a.jsonl", "question": "{a:2}"}, r"source\.question: expected names of columns in braces"),
        (
            {"path": "a.jsonl", "where": {"level": {"=>": 3}}},
            r"source\.where: column 'level': expected a value, a list of values, or conditions out of '<', .*'=>': 3",
        ),
        ({"path": "a.jsonl", "where": {"level": {}}}, r"column 'level': expected .* got \{\}"),
        ({"path": "a.jsonl", "where": {"level": {"empty": 1}}}, r"'level': expected empty: true or false, got 1"),
        ({"path": "a.jsonl", "where": {"level": {">": [1]}}}, r"'level': expected a number or text after >, got \[1\]"),
        ({"path": "a.jsonl", "name": "a/b"}, r"source\.name: expected a name without slashes, got 'a/b'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DataSource(**settings)


def test_dotted_columns():
    row = {"a": {"b": 1, "c": None}, "a.c": 2}
    assert look_up(row, "a.b") == 1
    assert look_up(row, "a.c") == 2
    assert look_up(row, "a.b.c") is MISSING
    assert look_up(row, "d") is MISSING
    assert matches(row, {})
    assert matches(row, {"a.b": "1"})
    assert not matches(row, {"a.b": [2, 3]})
    assert not matches(row, {"d": None})
    assert not matches({"a": math.nan}, {"a": 1})
    assert look_up({"a": [{"b": 1}]}, "a.0.b") == 1
    assert look_up({"a": [1]}, "a.1") is MISSING


@pytest.mark.parametrize(
    ("value", "condition", "met"),
    [
        (3, {">=": 3}, True),
        (3, {">": 3}, False),
        (3, {">": 1, "<": 5}, True),
        (7, {">": 1, "<": 5}, False),
        ("10", {">": "9"}, True),  # a CSV file holds numbers as text
        ("10", {"<=": 9}, False),
        ("2024-05-01", {">=": "2024-01-01"}, True),
        ("many", {">": 1}, False),
        (None, {">": 1}, False),
        (math.nan, {"<": 1}, False),
        ("de", {"!=": "en"}, True),
        ("de", {"!=": ["en", "de"]}, False),
        (1, {"!=": "1"}, False),
        (None, {"!=": "en"}, True),
        (" ", {"empty": True}, True),
        (None, {"empty": True}, True),
        (math.nan, {"empty": True}, True),
        ([], {"empty": True}, True),
        (0, {"empty": True}, False),
        ("x", {"empty": False}, True),
        ("", {"empty": False}, False),
        (MISSING, {"empty": True}, True),
        (MISSING, {"empty": False}, False),
        (MISSING, {"!=": "en"}, False),
        (MISSING, {"<": 1}, False),
    ],
)
def test_conditions(value, condition, met):
    assert matches({} if value is MISSING else {"a": value}, {"a": condition}) is met


@pytest.mark.parametrize("ending", WRITERS)
def test_conditions_select_alike_in_every_format(data, ending):
    source = DataSource(data(ROWS, ending), where={"level": {"<": 2}, "language": {"!=": "en"}})
    assert [problem.answer for problem in load_problems(source, "train")] == ["6"]
