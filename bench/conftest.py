"""What benchmarks print, their ratios to peers, is in pytest's summary without `-s`."""


def pytest_terminal_summary(terminalreporter) -> None:
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.nodeid.startswith("bench/"):
            terminalreporter.write(report.capstdout)
