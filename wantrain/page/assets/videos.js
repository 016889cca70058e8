"use strict";
// One clock for all videos of a page: they play, stop and move together. Only what is in view plays.
const Player = (() => {
  const seen = new Set();
  let playing = true,
    time = 0,
    began = performance.now();
  const observer = new IntersectionObserver(
    (changes) => {
      changes.forEach(({ target, isIntersecting }) =>
        isIntersecting ? seen.add(target) : (seen.delete(target), target.pause()),
      );
      follow();
    },
    { rootMargin: "100px" },
  );
  const known = () => [...document.querySelectorAll("video")];
  const length = () => Math.max(0, ...known().map((video) => (Number.isFinite(video.duration) ? video.duration : 0)));
  const now = () =>
    !length() ? 0 : playing ? (time + (performance.now() - began) / 1000) % length() : Math.min(time, length());

  function place(video, at) {
    if (!Number.isFinite(video.duration)) return;
    const wanted = Math.min(at % (length() || 1), Math.max(0, video.duration - 0.01));
    if (Math.abs(video.currentTime - wanted) > (playing ? 0.12 : 0.001)) video.currentTime = wanted;
  }
  function follow() {
    const at = now();
    for (const video of known()) {
      if (!seen.has(video) && !video.hasAttribute("data-waiting")) continue;
      place(video, at);
      if (playing && video.paused && seen.has(video)) video.play().catch(() => {});
      if (!playing && !video.paused) video.pause();
    }
  }
  function seek(seconds) {
    time = seconds;
    began = performance.now();
    known().forEach((video) => place(video, time));
    show();
  }
  function toggle(on = !playing) {
    time = now();
    began = performance.now();
    playing = on;
    follow();
    show();
  }
  function show() {
    document.querySelectorAll("[data-play]").forEach((button) => {
      button.textContent = playing ? "Pause" : "Play";
    });
    const at = length() ? (1000 * now()) / length() : 0;
    document.querySelectorAll("[data-time]").forEach((slider) => {
      if (document.activeElement !== slider || playing) slider.value = at;
    });
  }
  function watch(video) {
    observer.observe(video);
    video.muted = true;
    video.addEventListener("loadedmetadata", () => {
      video.classList.toggle("small", video.videoWidth < 200);
      follow();
    });
    if (video.readyState >= 1) video.classList.toggle("small", video.videoWidth < 200);
    return video;
  }
  function start() {
    known().forEach(watch);
    document.querySelectorAll("[data-play]").forEach((button) => button.addEventListener("click", () => toggle()));
    document.querySelectorAll("[data-time]").forEach((slider) =>
      slider.addEventListener("input", () => {
        toggle(false);
        seek((slider.value / 1000) * length());
      }),
    );
    setInterval(() => {
      follow();
      show();
    }, 200);
  }
  return {
    start,
    watch,
    toggle,
    seek,
    now,
    forget: (video) => {
      observer.unobserve(video);
      seen.delete(video);
    },
  };
})();
if (window === window.top && !document.body.classList.contains("run")) Player.start();
