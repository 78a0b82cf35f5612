from diagnose_calibration import PAIRS, ZOO_PAIRS, headline

from opd_lightning.sandbox.make_zoo import RECIPES


def test_the_headline_is_what_says_whether_to_distil():
    assert headline(["Most answers are cut: raise it", "Distil", "Beyond 9 tokens it is noise"]) == "Distil"
    assert headline(["Cold start first"]) == "Cold start first"


def test_pairs_name_models_that_are_made():
    made = {*RECIPES, "student", "teacher", "other-notation imitated"}
    assert all({student, teacher} <= made for student, teacher, _ in ZOO_PAIRS.values())
    assert not PAIRS.keys() & ZOO_PAIRS.keys() - {"student from teacher", "teacher from student"}
