"""`python -m lorafold` is `lorafold`."""

from lorafold.cli import main

main()
