from mismatch_probe.cli.main import main

if __name__ == "__main__":
    main()
