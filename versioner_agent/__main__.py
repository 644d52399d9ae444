"""`python -m versioner_agent`."""

from versioner_agent.cli import main

if __name__ == "__main__":
    main()
