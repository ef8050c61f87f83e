"""Command line: write an expert's episodes of a game as train.parquet and test.parquet."""

from dsft import cli
from dsft.config import GenerateConfig


def run(config: GenerateConfig) -> None:
    """Generate the data and print a summary."""
    from dsft.envs.expert_data import generate

    for line in generate(config).lines():
        print(line)


def main() -> None:
    """The dsft-generate command."""
    cli.main(GenerateConfig, run)


if __name__ == "__main__":
    main()
