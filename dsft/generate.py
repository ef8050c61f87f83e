"""Command line: write an expert's episodes of a game as train.parquet and test.parquet."""

from dsft import cli
from dsft.config import GenerateConfig


@cli.command(GenerateConfig)
def main(config: GenerateConfig) -> None:
    """Generate the data and print a summary."""
    from dsft.envs.expert_data import generate

    for line in generate(config).lines():
        print(line)


if __name__ == "__main__":
    main()
