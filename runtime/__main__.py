"""`python -m furiosa_llm` is `furiosa-serve`."""

from furiosa_llm.cli.main import main

if __name__ == "__main__":
    main(prog_name="furiosa-serve")
