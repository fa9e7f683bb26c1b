"""The sub-commands of `rayrlhf`, a file for each group of them; `jobs.cli` puts them together."""
