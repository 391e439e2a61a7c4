"""What a benchmark was to reach."""


def aim(what: str, value: float, bound: float, least: bool = False) -> None:
    """Say whether a figure is within its bound: at most that, or at least."""
    met = value >= bound if least else value <= bound
    said = f"at {'least' if least else 'most'} {bound:,g}"
    print(f"aim: {what} {said}; {value:,.4g} here: {'met' if met else 'missed'}.")
