"""Command line: generate -> train -> merge the best checkpoint -> validate."""

from dsft import cli
from dsft.config import PipelineConfig


@cli.command(PipelineConfig)
def main(config: PipelineConfig) -> None:
    """Run the remaining steps and print the table of results."""
    from dsft.orchestration import Pipeline

    for line in Pipeline(config).run():
        print(line)


if __name__ == "__main__":
    main()
