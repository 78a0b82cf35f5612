"""A small report with everything in it."""

from opd_lightning.reports.contents import Curve, Panel, Report, Statement, Table, Text

REPORT = Report(
    title="A <title> & more",
    subtitle="64 prompts",
    statements=[Statement("Distil", [("because", "0.2 > 0.05"), ("source", "arXiv 2604.13016")])],
    tables=[Table("Facts", ("", "value"), [("overlap", "0.75")], "k = 16")],
    panels=[
        Panel("Gain", "depth", "accuracy", [Curve("gain", [0, 8], [0.3, 0.1], [0.1, 0.1])]),
        Panel("In nats", "position", "nats", [Curve("p", [0, 1], [1, 2]), Curve("q", [0, 1], [2, 1])]),
    ],
    texts=[Text("Prompt", "<|user|>1 < 2\n<script>alert(1)</script>")],
    notes=["Left out: nothing."],
)
