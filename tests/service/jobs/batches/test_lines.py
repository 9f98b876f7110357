"""Lines of the input file of a batch, and of its output and error file."""

import json
from codecs import BOM_UTF8

from service.jobs.batches.lines import LineAnswer, numbered_lines, unanswered


def test_lines_are_numbered_from_one_and_a_long_one_is_cut_and_the_last(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(BOM_UTF8 + b"one\n\ntwo")
    assert list(numbered_lines(path, 100)) == [(1, b"one\n"), (2, b"\n"), (3, b"two")]
    path.write_bytes(b"one\n" + b"x" * 50 + b"\nthree\n")
    assert list(numbered_lines(path, 9)) == [(1, b"one\n"), (2, b"x" * 10)]


def test_each_line_of_each_batch_has_an_id_of_its_own():
    answers = [
        LineAnswer.of("req_1", batch, number, "a", 200, {}) for batch in ("batch_1", "batch_2") for number in (1, 2)
    ]
    assert len({json.loads(answer.text)["id"] for answer in answers}) == 4
    assert not any(answer.failed for answer in answers)


def test_a_line_without_an_answer_has_its_id_and_the_reason():
    line = json.loads(unanswered("batch_1", 1, b'{"custom_id": "a"}', "expired"))
    assert line["id"] == json.loads(LineAnswer.of("req_1", "batch_1", 1, "a", 500, {}).text)["id"]
    assert (line["custom_id"], line["response"], line["error"]["code"]) == ("a", None, "batch_expired")
