"""Command line: merge a LoRA checkpoint into its base model."""

from dsft import cli
from dsft.config import MergeConfig


@cli.command(MergeConfig)
def main(config: MergeConfig) -> None:
    """Merge, print the verification, and upload the result if asked to."""
    from dsft.distributed import runtime

    def work() -> None:
        if not config.debug:
            runtime.silence_libraries()
        from dsft.export.merging import merge

        report = merge(config)
        print(f"merged   {report.checkpoint} into {report.output}: {report.merged_weights} weights changed, no other")
        print(
            f"proof    reloaded against base + adapter: largest difference of a logit {report.largest_difference:.3g}, "
            f"{report.relative_difference:.3g} of their spread (tolerance {report.tolerance:g})"
        )
        if config.push_to_hub is not None:
            from dsft.export.hub import push

            print(f"pushed   {push(report.output, config.push_to_hub, private=config.hub_private)}")

    runtime.run_to_exit(work, debug=config.debug)


if __name__ == "__main__":
    main()
