"""Command line: evaluate a model in a game, or on dialogues."""

from dsft import cli
from dsft.config import ValidateConfig


@cli.command(ValidateConfig)
def main(config: ValidateConfig) -> None:
    """Validate and print the figures."""
    from dsft.distributed import runtime

    def work() -> None:
        from dsft.validation.evaluate import validate

        for line in validate(config):
            print(line)

    runtime.run_to_exit(work, debug=config.debug)


if __name__ == "__main__":
    main()
