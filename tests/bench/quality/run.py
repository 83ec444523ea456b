"""What examples are worth to real models, by how they are chosen and shown: ask, learn, draw the tables.

    make bench-quality                          asks for what is not on file (hours), then draws the tables
    make bench-quality ARGS="--offline"         draws them from the answers on file (a minute, no model)

It may be ended at any time and goes on where it was. Three models answer, with one thread each, one after the other.
"""

from __future__ import annotations

import argparse

from tests.bench.quality import conditions, learn, table
from tests.bench.quality.collect import TEST, TRAIN, collect
from tests.bench.quality.models import MODELS, asking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="ask no model")
    if not parser.parse_args().offline:
        for steps in (TRAIN, TEST):
            for model in MODELS.values():
                with asking(model, True) as answers:
                    collect(answers, steps[model.name])
                    answers.pack()
            if steps is TRAIN:
                learn.main()
                conditions.prior.cache_clear()
    table.main()


if __name__ == "__main__":
    main()
