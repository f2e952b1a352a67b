"""``scripts/bench``: what Cargo costs, measured on this machine against its baselines in the same run.

It measures and never asserts. Each case is interleaved with its baseline, so that both meet the same machine;
what carries over to other machines is the ratio of the medians.

Reading order: figures (a series and its table), case (what a case is), stage (a lab with a service to move), then a
module for each case: outage, peers, link, service, union, touch, bus, fleet, agent; page and plots (what becomes of
the figures); cli. Nothing here is part of the product, and nothing of the product knows of it.
"""
