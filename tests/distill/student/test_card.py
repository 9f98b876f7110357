"""The content of a model card."""

import pytest

from distill.pipeline import SHIPPED_STUDENT
from distill.student.card import MAX_EXAMPLES, description_of


def test_description_and_examples_are_read(tmp_path):
    card = "---\nwidget:\n- text: a red circle\n- text: 7\n- a blue star\n---\n# Name\n\n![picture](a.png)\n\n"
    (tmp_path / "README.md").write_text(f"{card}Draws **shapes** of [a `dataset`](data.md),\nin color.\n\nMore.\n")
    assert description_of(tmp_path) == ("Draws shapes of a dataset, in color.", ("a red circle",))
    description, examples = description_of(SHIPPED_STUDENT)
    assert "colored shapes" in description
    assert 0 < len(examples) <= MAX_EXAMPLES


@pytest.mark.parametrize("card", ["", "---\nwidget: [\n---\n", "---\nwidget: text\n---\n# Name\n", "---\n- 1\n---\n"])
def test_a_card_without_them_gives_none(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert description_of(tmp_path) == ("", ())
    (tmp_path / "README.md").unlink()
    assert description_of(tmp_path) == ("", ())
