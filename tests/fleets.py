"""Replicas without an engine."""

import asyncio

from moescope.deploy.fleet import Answer
from moescope.deploy.target import apply


class Replica:
    """Does what it is told until it is `deaf`; `fails` is what it answers to that order."""

    def __init__(self, fleet, name, have, *, fails=None, pages=None):
        self.fleet, self.name, self.have = fleet, name, have
        self.fails, self.pages, self.deaf = fails, pages or {}, False
        self.orders, self.entered = [], asyncio.Event()
        self.task = asyncio.create_task(self.run())

    async def run(self):
        while True:
            while (entry := await self.fleet.enter(self.name, self.have)).ticket is None:
                for step in entry.steps:
                    self.have = apply(self.have, step)
            self.entered.set()
            answer = None
            while order := await self.fleet.follow(entry.ticket, answer):
                answer = None
                if order is not True:
                    answer = self.obey(order)
                while self.deaf:
                    await asyncio.sleep(0.01)

    def obey(self, order):
        self.orders.append(order)
        if order.what == self.fails:
            return Answer(order.number, why="it can't")
        for step in order.steps:
            self.have = apply(self.have, step)
        return Answer(order.number, pages=self.pages)
