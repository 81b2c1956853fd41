"""The command line: each command parses, calls one public function, prints. Results on stdout, all else on stderr.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 finished but some videos failed, 130 interrupted (run the same again
to go on).
"""

from __future__ import annotations

import click

from tad._version import __version__
from tad.cli.analysis import compare, diagnose
from tad.cli.backbone import classify, train_backbone
from tad.cli.classifier import train_classifier
from tad.cli.common import TadGroup
from tad.cli.detection import detect, train_detector
from tad.cli.doctor import doctor
from tad.cli.ensemble import fuse
from tad.cli.exchange import convert
from tad.cli.extract import extract
from tad.cli.joint import train_joint
from tad.cli.recipe import recipe
from tad.cli.report import plot, report
from tad.cli.scores import demo, evaluate
from tad.cli.store import store
from tad.cli.weights import weights

COMMANDS = (
    extract,
    store,
    train_backbone,
    train_classifier,
    classify,
    train_detector,
    train_joint,
    detect,
    fuse,
    evaluate,
    report,
    plot,
    diagnose,
    compare,
    convert,
    doctor,
    weights,
    recipe,
    demo,
)


@click.group(cls=TadGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tad")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def main(verbose: bool) -> None:
    """Temporal action detection: videos → features → detections → scores.

    \b
    tad demo                                                    the whole path on synthetic videos, in minutes
    tad extract VIDEOS --store S --backbone i3d --weights F     videos into a feature store, once
    tad train-detector talnet --store S --streams A,B -o RUN    a detector on stored features
    tad detect VIDEO --run RUN -o found.json                    what happens when
    tad evaluate --annotations A --predictions found.json       how good that is
    tad report --annotations A --predictions found.json         scores, errors, every video's timeline in a page
    tad doctor --annotations A --store S                        what is wrong before anything expensive starts
    """


for command in COMMANDS:
    main.add_command(command)
